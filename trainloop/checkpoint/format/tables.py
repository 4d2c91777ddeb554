"""The tables of a checkpoint: its files, and the location of each tensor in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .boxes import Box, are_exact_cover, overlap
from .checks import inner_path, mapping, only_keys, shown, sizes, text, whole
from .dtypes import DTYPES
from .limits import MAX_FILES, MAX_TENSORS
from .rules import Rule, read_rule, rule_as_json, shard_file

STATE = "state"
"""The folder for state outside of groups. No group may have this name."""


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file, as it was written."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, stored in a file under `key`."""

    file: str
    key: str
    offset: tuple[int, ...]
    """Offset of the box in the tensor; () for a 0-dim tensor."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RankFiles:
    """The parts of a tensor that a rule cuts. They are in the files of the ranks, under the same key in each."""

    rule: Rule
    group: str
    key: str


@dataclass(frozen=True)
class TensorRecord:
    """A tensor. Its parts cover it without overlap."""

    dtype: str
    """Torch's name, "bfloat16"."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()
    """The parts, if there is no rule."""
    alias_of: str | None = None
    """The tensor of the same group that shares its memory (tied weights). The bytes are stored only under that name."""
    ruled: RankFiles | None = None
    """The parts, if a rule describes them."""

    def parts(self) -> Iterator[Chunk]:
        """All parts."""
        return self.parts_in(((0,) * len(self.shape), self.shape)) if self.ruled is not None else iter(self.chunks)

    def parts_in(self, box: Box) -> Iterator[Chunk]:
        """The parts that overlap a box of the tensor. The time doesn't grow with the number of ranks."""
        if self.ruled is None:
            yield from (chunk for chunk in self.chunks if overlap((chunk.offset, chunk.shape), box) is not None)
            return
        for rank, part in self.ruled.rule.parts_in(box, self.shape):
            if overlap(part, box) is not None:
                yield Chunk(shard_file(self.ruled.group, rank), self.ruled.key, *part)

    def part_of(self, rank: int) -> Chunk | None:
        """The part that the rule assigns to a rank. None: there is no rule, or it assigns none."""
        part = self.ruled.rule.part_of(rank, self.shape) if self.ruled is not None else None
        if self.ruled is None or part is None:
            return None
        return Chunk(shard_file(self.ruled.group, rank), self.ruled.key, *part)

    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class FrozenRecord:
    """A frozen parameter that the checkpoint leaves out. `build_model` must provide the same one."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: str
    """Fingerprint of its bits, see `checkpoint/fingerprint.py`."""


Files = Mapping[str, FileRecord]
"""By path in the checkpoint."""
TensorTable = Mapping[str, Mapping[str, TensorRecord]]
"""By group and name."""

_FILE_KEYS = frozenset(field.name for field in fields(FileRecord))
_FROZEN_KEYS = frozenset(field.name for field in fields(FrozenRecord))
_CHUNK_KEYS = frozenset(("file", "offset", "shape"))
_OLD_CHUNK_KEYS = frozenset(("file", "key", "offset", "shape"))
_OLD_TENSOR_KEYS = frozenset(("dtype", "shape", "chunks", "alias_of"))
_ALIAS_KEYS = frozenset(("alias_of",))
_TENSOR_KEYS = {
    "file": frozenset(("dtype", "shape", "file")),
    "cuts": frozenset(("dtype", "shape", "first", "cuts")),
    "chunks": frozenset(("dtype", "shape", "chunks")),
}
"""Allowed keys by the key that gives the location: whole in one file, cut by a rule, or in arbitrary parts."""


def tensors_as_json(tensors: TensorTable) -> dict[str, dict[str, Any]]:
    """The JSON that `read_tensors` reads."""
    return {
        group: {name: _record_as_json(record) for name, record in records.items()} for group, records in tensors.items()
    }


def read_files(content: Any) -> dict[str, FileRecord]:
    """Read the files of a checkpoint from the JSON of its tables.

    Raises:
        KeyError, TypeError, ValueError: The JSON is not valid.
    """
    entries = mapping("files", content, MAX_FILES)
    return {inner_path("files", path): read_file_record(path, record) for path, record in entries.items()}


def read_file_record(path: str, record: Any) -> FileRecord:
    """Read the record of one file from JSON.

    Raises:
        TypeError, ValueError: The JSON is not valid.
    """
    only_keys(path, mapping(path, record, 2), _FILE_KEYS)
    return FileRecord(whole("num_bytes", record["num_bytes"]), whole("crc32", record["crc32"]))


def read_tensors(content: Any, files: Files, version: int) -> dict[str, dict[str, TensorRecord]]:
    """Read the tensors of a checkpoint, by group and name, from the JSON of its tables.

    Args:
        content: The JSON.
        files: Files of the checkpoint.
        version: Version of the format.

    Raises:
        KeyError, TypeError, ValueError: The JSON is not valid, or the files cannot contain these tensors.
    """
    tensors: dict[str, dict[str, TensorRecord]] = {}
    num_left = MAX_TENSORS
    claims = _Claims(files)
    for group, records in mapping("tensors", content, MAX_TENSORS).items():
        if not group.isidentifier() or group == STATE:
            raise ValueError(f"a group of tensors must have an identifier as its name, but one has {shown(group)}")
        records = mapping(group, records, num_left)
        num_left -= len(records)
        if version < 3:
            tensors[group] = {name: _old_tensor_record(name, record) for name, record in records.items()}
        else:
            tensors[group] = _tensor_records(group, records)
        for name, record in tensors[group].items():
            if record.alias_of is None:
                claims.add(group, name, record)
            elif replace(record, alias_of=None) != tensors[group].get(record.alias_of):
                raise ValueError(f"{group}/{name} is not as {shown(record.alias_of)}, under which it is stored")
        claims.check_ruled(group)
    return tensors


def read_frozen(content: Any, tensors: Mapping[str, Mapping[str, TensorRecord]]) -> dict[str, FrozenRecord]:
    """Read the parameters that a checkpoint leaves out, from the JSON of its tables.

    Raises:
        KeyError, TypeError, ValueError: The JSON is not valid.
    """
    frozen = {}
    for name, record in mapping("frozen", content, MAX_TENSORS).items():
        only_keys(name, mapping(name, record, 3), _FROZEN_KEYS)
        if name in tensors.get("model", {}):
            raise ValueError(f"{name} is both in the checkpoint and left out of it")
        fingerprint = text("fingerprint", record["fingerprint"])
        frozen[name] = FrozenRecord(_dtype(name, record["dtype"]), sizes(name, record["shape"]), fingerprint)
    return frozen


class _Claims:
    """Assigns the bytes of the files to tensors. Each byte belongs to one tensor at most, so all tensors must fit."""

    def __init__(self, files: Files) -> None:
        self._unclaimed = {path: record.num_bytes for path, record in files.items()}
        self._claimed: set[tuple[str, str]] = set()
        self._num_ruled, self._last_rank, self._of = 0, -1, ""

    def add(self, group: str, name: str, record: TensorRecord) -> None:
        if record.ruled is not None:
            last = record.ruled.rule.last_rank(record.shape)
            if last > self._last_rank:
                self._last_rank, self._of = last, name
            self._num_ruled += record.num_bytes()
        for chunk in record.chunks:
            if (chunk.file, chunk.key) in self._claimed or chunk.file not in self._unclaimed:
                is_file = chunk.file in self._unclaimed
                why = "is that of another tensor" if is_file else "is none of the checkpoint's files"
                raise ValueError(f"{name} lies in {shown(chunk.file)} as {shown(chunk.key)}, which {why}")
            self._claimed.add((chunk.file, chunk.key))
            self._unclaimed[chunk.file] -= math.prod(chunk.shape) * DTYPES[record.dtype].itemsize
            if self._unclaimed[chunk.file] < 0:
                raise ValueError(f"{chunk.file} is too small for its tensors, the last of which is {name}")

    def check_ruled(self, group: str) -> None:
        """Check the rules of a group once, after all its tensors were added. Checking each part would take time for
        each rank and tensor. The parts are later compared with the header of their file.
        """
        if self._num_ruled:
            num_bytes, rank = 0, 0
            while (path := shard_file(group, rank)) in self._unclaimed:
                num_bytes += self._unclaimed[path]
                rank += 1
            if self._last_rank >= rank:
                raise ValueError(
                    f"{self._of} lies in {shown(shard_file(group, min(rank, MAX_FILES)))}, which is none of the"
                    " checkpoint's files"
                )
            if self._num_ruled > num_bytes:
                raise ValueError(f"the files of {group} are too small for its tensors")
        self._num_ruled, self._last_rank, self._of = 0, -1, ""


# ---------------------------------------------------------------------- one record


def _record_as_json(record: TensorRecord) -> dict[str, Any]:
    if record.alias_of is not None:
        return {"alias_of": record.alias_of}
    about: dict[str, Any] = {"dtype": record.dtype, "shape": record.shape}
    if record.ruled is not None:
        return about | rule_as_json(record.ruled.rule)
    if len(record.chunks) == 1 and _is_whole(record.chunks[0], record.shape):
        return about | {"file": record.chunks[0].file}
    return about | {"chunks": [{"file": c.file, "offset": c.offset, "shape": c.shape} for c in record.chunks]}


def _tensor_records(group: str, records: Mapping[str, Any]) -> dict[str, TensorRecord]:
    read: dict[str, TensorRecord] = {}
    for name, record in records.items():
        if "alias_of" not in mapping(name, record, 4):
            read[name] = _tensor_record(group, name, record)
    for name, record in records.items():
        if name not in read:
            only_keys(name, record, _ALIAS_KEYS)
            kept = text("alias_of", record["alias_of"])
            if kept not in read or read[kept].alias_of is not None:
                raise ValueError(f"{group}/{name} is stored under {shown(kept)}, which is no tensor that is stored")
            read[name] = replace(read[kept], alias_of=kept)
    return {name: read[name] for name in records}


def _tensor_record(group: str, name: str, record: Mapping[str, Any]) -> TensorRecord:
    only_keys(name, record, next((keys for key, keys in _TENSOR_KEYS.items() if key in record), _TENSOR_KEYS["file"]))
    dtype, shape = _dtype(name, record["dtype"]), sizes(name, record["shape"])
    if "cuts" in record:
        rule = read_rule(name, record["first"], record["cuts"], shape)
        return TensorRecord(dtype, shape, ruled=RankFiles(rule, group, name))
    if "file" in record:
        path = _own_file(group, name, record["file"])
        return TensorRecord(dtype, shape, (Chunk(path, name, (0,) * len(shape), shape),))
    chunks = tuple(
        Chunk(_own_file(group, name, chunk["file"]), name, *_box(name, chunk, len(shape)))
        for chunk in _list_of(name, record["chunks"], _CHUNK_KEYS)
    )
    _check_cover(name, chunks, shape)
    return TensorRecord(dtype, shape, chunks)


def _old_tensor_record(name: str, record: Any) -> TensorRecord:
    """Read a record of format 1 or 2."""
    only_keys(name, mapping(name, record, 4), _OLD_TENSOR_KEYS)
    dtype, shape, alias_of = _dtype(name, record["dtype"]), sizes(name, record["shape"]), record["alias_of"]
    chunks = tuple(
        Chunk(text("file", chunk["file"]), text("key", chunk["key"]), *_box(name, chunk, len(shape)))
        for chunk in _list_of(name, record["chunks"], _OLD_CHUNK_KEYS)
    )
    _check_cover(name, chunks, shape)
    return TensorRecord(dtype, shape, chunks, alias_of if alias_of is None else text("alias_of", alias_of))


def _dtype(name: str, value: Any) -> str:
    if type(value) is not str or value not in DTYPES:
        raise ValueError(f"{name} must have a dtype that can be stored, but has {shown(value)}")
    return value


def _own_file(group: str, name: str, value: Any) -> str:
    """Check that a tensor's file belongs to its group. Groups share no files, so each key belongs to one tensor."""
    if not text("file", value).startswith(f"{group}/"):
        raise ValueError(f"{name} lies in {shown(value)}, which is none of the checkpoint's files of {group}")
    return str(value)


def _list_of(name: str, chunks: Any, keys: frozenset[str]) -> list[Any]:
    if type(chunks) is not list:
        raise ValueError(f"the chunks of {name} must be a list, but are {shown(chunks)}")
    for chunk in chunks:
        only_keys(name, mapping(name, chunk, len(keys)), keys)
    return chunks


def _box(name: str, chunk: Mapping[str, Any], num_dims: int) -> Box:
    offset, shape = sizes(name, chunk["offset"]), sizes(name, chunk["shape"])
    if len(offset) != num_dims or len(shape) != num_dims:
        raise ValueError(f"the chunks of {name} must have its {num_dims} dimensions, but one is {shown(chunk)}")
    return offset, shape


def _is_whole(chunk: Chunk, shape: Sequence[int]) -> bool:
    return chunk.shape == tuple(shape) and not any(chunk.offset)


def _check_cover(name: str, chunks: Sequence[Chunk], shape: tuple[int, ...]) -> None:
    is_whole = len(chunks) == 1 and _is_whole(chunks[0], shape)
    if not is_whole and not are_exact_cover([(chunk.offset, chunk.shape) for chunk in chunks], shape):
        raise ValueError(f"what the files hold of {name} does not make up its shape {shown(list(shape))}")
