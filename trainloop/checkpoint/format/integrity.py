"""Checksums, and whether the files of a checkpoint are what was written."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from .layout import FileRecord

Buffer: TypeAlias = "bytes | memoryview"
Verify: TypeAlias = Literal["full", "size", "off"]

VERIFY_LEVELS = ("full", "size", "off")
_BLOCK = 2**20  # bytes read at once: they are still in the cache when their checksum is taken
_NUM_THREADS = 4


def crc32(buffers: Iterable[Buffer]) -> int:
    """CRC-32 of the buffers, one after the other."""
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every element of the tensors, which are on the CPU, is finite."""
    # A sum is finite only if all that it is made of is. It reads the memory once and copies nothing: an eighth of what
    # `isfinite` takes. One that overflows is looked at again.
    return all(_is_finite(tensor) for tensor in tensors)


def _is_finite(tensor: torch.Tensor) -> bool:
    total = torch.view_as_real(tensor).sum() if tensor.is_complex() else tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


class BackgroundCrc32:
    """CRC-32 of buffers, computed by a thread while the disk is busy with them. A bare thread: executors refuse work
    while the interpreter ends, when a save may still be in flight.
    """

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self._crc = 0
        self._thread = threading.Thread(target=self._run, args=(buffers,), name="crc32")
        self._thread.start()

    def result(self) -> int:
        """The checksum, when it is ready."""
        self._thread.join()
        return self._crc

    def _run(self, buffers: Iterable[Buffer]) -> None:
        self._crc = crc32(buffers)


def crc32_of_file(path: Path) -> int:
    """CRC-32 of a file's bytes, read block by block."""
    crc = 0
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while num_read := file.readinto(block):
            crc = zlib.crc32(block[:num_read], crc)
    return crc


def find_problems(folder: Path, files: Mapping[str, FileRecord], verify: Verify = "full") -> list[str]:
    """What is wrong with the files of a checkpoint, a sentence each that begins with the file's path.

    Args:
        folder: The checkpoint.
        files: The files to look at, by path inside `folder`.
        verify: "full" reads every byte; "size" only asks for the sizes; "off" looks at nothing.
    """
    if verify == "off":
        return []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:  # reading and CRC-32 run beside one another: neither holds the GIL
        found = pool.map(lambda path: _problem(folder, path, files[path], verify), files)
        return [problem for problem in found if problem]


def _problem(folder: Path, path: str, record: FileRecord, verify: Verify) -> str:
    try:
        num_bytes = (folder / path).stat().st_size
        if num_bytes != record.num_bytes:
            return f"{path} has {num_bytes} bytes instead of {record.num_bytes}"
        if verify == "full" and crc32_of_file(folder / path) != record.crc32:
            return f"{path} is damaged: its bytes are not those that were written (CRC-32 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as ex:
        return f"{path} cannot be read ({ex.strerror or ex})"
    return ""


def is_whole(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether every file is there in its full size."""
    return not find_problems(folder, files, "size")
