"""Checks the files of a checkpoint against its manifest."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ...errors import CheckpointError
from .dtypes import DTYPES
from .files import check_regular, open_regular, read_regular
from .layout import Manifest, tensors_beside
from .limits import MAX_JSON_BYTES
from .nested import decode, parse_json
from .rules import parse_shard_file
from .tables import STATE, Chunk, FileRecord, TensorRecord
from .tensorfile import TensorFile, open_tensors

Verify: TypeAlias = Literal["full", "size", "off"]
Stored: TypeAlias = "Mapping[str, list[tuple[str, Chunk]]]"
"""By path: the chunks in a file, each with the dtype of its tensor."""

VERIFY_LEVELS = ("full", "size", "off")
_BLOCK = 2**20  # bytes read at once; they are still in the cache for the checksum
_NUM_THREADS = 4


def find_problems(folder: Path, manifest: Manifest, paths: Collection[str], verify: Verify = "full") -> list[str]:
    """Find problems with files of a checkpoint. Each problem is a sentence that begins with the file's path.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        paths: The files to check, relative to `folder`.
        verify: "full" reads every byte, and checks that tensors and state are stored as in the manifest. "size" checks
            only the sizes. "off" checks nothing.
    """
    if verify == "off":
        return []
    stored: Stored = {}
    if verify == "full":
        stored = stored_in(paths, *manifest.tensors.values())

    def look(path: str) -> str:
        try:
            if verify == "size":
                return _size_problem(path, check_regular(folder, path), manifest.files[path])
            return _problem(folder, path, manifest.files, stored.get(path, ()))
        except CheckpointError as ex:
            return str(ex)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as ex:
            return f"{path} cannot be read ({ex.strerror or ex})"

    with ThreadPoolExecutor(_NUM_THREADS) as pool:  # reading and CRC-32 run in parallel, because both release the GIL
        return [problem for problem in pool.map(look, paths) if problem]


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether every file exists in its full size."""
    return not find_problems(folder, manifest, manifest.files, "size")


def stored_in(paths: Iterable[str], *tables: Mapping[str, TensorRecord]) -> Stored:
    """The parts of tensors that files must contain.

    Args:
        paths: The files.
        *tables: The tensors of some groups, by name.
    """
    stored: dict[str, list[tuple[str, Chunk]]] = {path: [] for path in paths}
    by_group: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path in stored:
        if (found := parse_shard_file(path)) is not None:
            by_group[found[0]].append((path, found[1]))
    for records in tables:
        for record in records.values():
            if record.alias_of is not None:
                continue
            for chunk in record.chunks:
                if chunk.file in stored:
                    stored[chunk.file].append((record.dtype, chunk))
            for path, rank in by_group[record.ruled.group] if record.ruled is not None else ():
                if (part := record.part_of(rank)) is not None:
                    stored[path].append((record.dtype, part))
    return stored


def check_stored(file: TensorFile, stored: Iterable[tuple[str, Chunk]]) -> None:
    """Raise unless a file contains chunks with these dtypes and shapes.

    Raises:
        CheckpointError: It doesn't.
    """
    for dtype, chunk in stored:
        file.check(chunk.key, DTYPES[dtype], chunk.shape)


def read_state(folder: Path, path: str, files: Collection[str], *, on_meta: bool = False) -> Any:
    """Read the nested state in a file, with its tensors from the file beside it.

    Args:
        folder: The checkpoint.
        path: Path of the file of nested state.
        files: All files of the checkpoint.
        on_meta: Don't read tensors; those in the state are on the meta device.

    Raises:
        OSError: The file cannot be read.
        CheckpointError: It is not valid nested state, or doesn't match its tensors.
    """
    beside, tensors = tensors_beside(path), {}
    if beside in files:
        with open_tensors(folder, beside) as file:
            tensors = file.empty("meta") if on_meta else file.read_all()
    try:
        return decode(parse_json(read_regular(folder, path, MAX_JSON_BYTES)), tensors)
    except KeyError as ex:
        raise CheckpointError(f"{path} is damaged: {beside} does not have {ex}") from ex
    except (ArithmeticError, IndexError, TypeError, ValueError) as ex:
        raise CheckpointError(f"{path} is damaged: it is not nested state as it is written here ({ex})") from ex


def _problem(folder: Path, path: str, files: Mapping[str, FileRecord], stored: Collection[tuple[str, Chunk]]) -> str:
    with open_regular(folder, path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if problem := _size_problem(path, num_bytes, files[path]):
            return problem
        if _crc32_of(file, num_bytes) != files[path].crc32:
            return f"{path} is damaged: its bytes are not those that were written (CRC-32 differs)"
        if path.endswith(".safetensors"):
            file.seek(0)
            check_stored(TensorFile(file, path), stored)
        elif path.startswith(f"{STATE}/") and path.endswith(".json"):
            read_state(folder, path, files, on_meta=True)
    return ""


def _size_problem(path: str, num_bytes: int, record: FileRecord) -> str:
    return f"{path} has {num_bytes} bytes instead of {record.num_bytes}" if num_bytes != record.num_bytes else ""


def _crc32_of(file: BufferedReader, num_bytes: int) -> int:
    """CRC-32 of a file's bytes, read in blocks. Stops at the size that the file had when it was opened."""
    crc = 0
    block = memoryview(bytearray(min(_BLOCK, max(num_bytes, 1))))
    while num_bytes > 0 and (num_read := file.raw.readinto(block[: min(len(block), num_bytes)])):
        crc = zlib.crc32(block[:num_read], crc)
        num_bytes -= num_read
    return crc
