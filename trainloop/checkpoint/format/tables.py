"""The tables of a manifest: which files a checkpoint has, and where in them its tensors lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .boxes import are_exact_cover
from .checks import inner_path, mapping, only_keys, shown, sizes, text, whole
from .dtypes import DTYPES
from .limits import MAX_FILES, MAX_TENSORS

STATE = "state"
"""The folder of what is not in a group, so no group may have this name."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, which lies in a file under `key`."""

    file: str
    key: str
    offset: tuple[int, ...]
    """Where the box begins in the tensor; () for a 0-dim one."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """A tensor: the chunks cover it, and none overlaps another."""

    dtype: str
    """As torch names it, "bfloat16"."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    alias_of: str | None = None
    """The tensor of the same group that shares its memory (tied weights); the bytes are stored under that name only."""


@dataclass(frozen=True)
class FrozenRecord:
    """A frozen parameter that the checkpoint leaves out: what `build_model` must give again."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: str
    """Of its bits, see `checkpoint/fingerprint.py`."""


_FILE_KEYS, _CHUNK_KEYS, _TENSOR_KEYS, _FROZEN_KEYS = (
    frozenset(field.name for field in fields(kind)) for kind in (FileRecord, Chunk, TensorRecord, FrozenRecord)
)


def read_files(content: Any) -> dict[str, FileRecord]:
    """The files of a checkpoint, from the JSON of a manifest.

    Raises:
        KeyError, TypeError, ValueError: They cannot be.
    """
    entries = mapping("files", content, MAX_FILES)
    return {inner_path("files", path): _file_record(path, record) for path, record in entries.items()}


def read_tensors(content: Any, files: Mapping[str, FileRecord]) -> dict[str, dict[str, TensorRecord]]:
    """The tensors of a checkpoint by group and name, from the JSON of a manifest.

    Raises:
        KeyError, TypeError, ValueError: They cannot be, or the files cannot hold them.
    """
    tensors: dict[str, dict[str, TensorRecord]] = {}
    num_left = MAX_TENSORS
    unclaimed = {path: record.num_bytes for path, record in files.items()}
    claimed: set[tuple[str, str]] = set()
    for group, records in mapping("tensors", content, MAX_TENSORS).items():
        if not group.isidentifier() or group == STATE:
            raise ValueError(f"a group of tensors must have an identifier as its name, but one has {shown(group)}")
        records = mapping(group, records, num_left)
        num_left -= len(records)
        tensors[group] = {name: _tensor_record(name, record) for name, record in records.items()}
        for name, record in tensors[group].items():
            if record.alias_of is None:
                _claim(name, record, unclaimed, claimed)
            elif replace(record, alias_of=None) != tensors[group].get(record.alias_of):
                raise ValueError(f"{group}/{name} is not as {shown(record.alias_of)}, under which it is stored")
    return tensors


def read_frozen(content: Any, tensors: Mapping[str, Mapping[str, TensorRecord]]) -> dict[str, FrozenRecord]:
    """The parameters that a checkpoint leaves out, from the JSON of a manifest.

    Raises:
        KeyError, TypeError, ValueError: They cannot be.
    """
    frozen = {}
    for name, record in mapping("frozen", content, MAX_TENSORS).items():
        only_keys(name, mapping(name, record, 3), _FROZEN_KEYS)
        if name in tensors.get("model", {}):
            raise ValueError(f"{name} is both in the checkpoint and left out of it")
        fingerprint = text("fingerprint", record["fingerprint"])
        frozen[name] = FrozenRecord(_dtype(name, record["dtype"]), sizes(name, record["shape"]), fingerprint)
    return frozen


def _dtype(name: str, dtype: Any) -> str:
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"{name} must have a dtype that can be stored, but has {shown(dtype)}")
    return dtype


def _tensor_record(name: str, record: Any) -> TensorRecord:
    only_keys(name, mapping(name, record, 4), _TENSOR_KEYS)
    dtype, alias_of = _dtype(name, record["dtype"]), record["alias_of"]
    shape = sizes(name, record["shape"])
    if type(record["chunks"]) is not list:
        raise ValueError(f"the chunks of {name} must be a list, but are {shown(record['chunks'])}")
    chunks = tuple(_chunk(name, chunk, len(shape)) for chunk in record["chunks"])
    is_whole = len(chunks) == 1 and chunks[0].shape == shape and not any(chunks[0].offset)
    if not is_whole and not are_exact_cover([(chunk.offset, chunk.shape) for chunk in chunks], shape):
        raise ValueError(f"what the files hold of {name} does not make up its shape {shown(list(shape))}")
    return TensorRecord(dtype, shape, chunks, alias_of if alias_of is None else text("alias_of", alias_of))


def _chunk(name: str, chunk: Any, num_dims: int) -> Chunk:
    only_keys(name, mapping(name, chunk, 4), _CHUNK_KEYS)
    offset, shape = sizes(name, chunk["offset"]), sizes(name, chunk["shape"])
    if len(offset) != num_dims or len(shape) != num_dims:
        raise ValueError(f"the chunks of {name} must have its {num_dims} dimensions, but one is {shown(chunk)}")
    return Chunk(text("file", chunk["file"]), text("key", chunk["key"]), offset, shape)


def _claim(name: str, record: TensorRecord, unclaimed: dict[str, int], claimed: set[tuple[str, str]]) -> None:
    """Each byte of a file is that of one tensor at most: the tensors are not larger than the files."""
    for chunk in record.chunks:
        if (chunk.file, chunk.key) in claimed or chunk.file not in unclaimed:
            why = "is that of another tensor" if chunk.file in unclaimed else "is none of the checkpoint's files"
            raise ValueError(f"{name} lies in {shown(chunk.file)} as {shown(chunk.key)}, which {why}")
        claimed.add((chunk.file, chunk.key))
        unclaimed[chunk.file] -= math.prod(chunk.shape) * DTYPES[record.dtype].itemsize
        if unclaimed[chunk.file] < 0:
            raise ValueError(f"{chunk.file} is too small for its tensors, the last of which is {name}")


def _file_record(path: str, record: Any) -> FileRecord:
    only_keys(path, mapping(path, record, 2), _FILE_KEYS)
    return FileRecord(whole("num_bytes", record["num_bytes"]), whole("crc32", record["crc32"]))
