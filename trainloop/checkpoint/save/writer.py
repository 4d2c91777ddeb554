"""Writes a rank's part of a checkpoint, and makes the manifest of all parts."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...version import DISTRIBUTION, __version__
from ..disk.fs import FileSystem
from ..format.boxes import are_exact_cover
from ..format.integrity import BackgroundCrc32, Buffer, is_finite
from ..format.layout import Manifest
from ..format.tables import Chunk, FileRecord, TensorRecord
from ..format.tensorfile import serialize
from .plan import Plan
from .snapshot import Draft

NUM_TOLD = 5
"""Number of tensors that a message names."""
_METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True)
class Written:
    """What one rank has written."""

    files: dict[str, FileRecord]
    chunks: dict[str, dict[str, Chunk]]
    """The parts of tensors without a rule."""
    plan: int
    """Digest of the plan that was used."""
    non_finite: list[str]
    """Names of the first few tensors that must be finite but are not."""


def write_draft(fs: FileSystem, folder: Path, draft: Draft) -> Written:
    """Write and sync the files of one rank.

    Args:
        fs: The disk.
        folder: The temporary folder, which all ranks share.
        draft: The files to write. If it has an error, that is raised.
    """
    if draft.error is not None:
        raise draft.error
    draft.wait_for_copies()
    parents = {(folder / path).parent for path in draft.outputs}
    for parent in parents:
        fs.make_dir(parent)
    files = {}
    for path, output in draft.outputs.items():
        buffers = [output.text] if output.text is not None else serialize(output.tensors, _METADATA)
        files[path] = write_file(fs, folder / path, buffers, sync=False)
    non_finite = [name for name, tensor in draft.must_be_finite.items() if not is_finite(tensor)]
    for path in draft.outputs:  # after all are written, so that the disk commits them together
        fs.sync_path(folder / path)
    for parent in parents:
        fs.sync_dir(parent)
    return Written(files, draft.chunks, draft.plan, non_finite[:NUM_TOLD])


def write_file(fs: FileSystem, path: Path, buffers: Sequence[Buffer], sync: bool = True) -> FileRecord:
    """Write a file, and compute the checksum of the intended content while the disk is busy."""
    checksum = BackgroundCrc32(buffers)
    try:
        fs.write(path, buffers, sync)
    except OSError as ex:
        ex.filename = ex.filename or str(path)  # the error for a full disk doesn't contain the file's name
        raise
    finally:
        crc32 = checksum.result()
    return FileRecord(sum(map(len, buffers)), crc32)


def make_manifest(plan: Plan, written: Sequence[Written], *, versions: Mapping[str, str], **fields: Any) -> Manifest:
    """Describe a checkpoint that all ranks have written. Each rank has checked its own parts against the plan, so the
    parts are not checked one by one here.

    Args:
        plan: The plan of rank 0.
        written: By rank.
        versions: Versions of the libraries.
        **fields: The other fields of a `Manifest`, without health and the tables.

    Raises:
        CheckpointError: The ranks had different plans, two ranks wrote the same file, or the written parts of a tensor
            don't cover it exactly.
    """
    files: dict[str, FileRecord] = {}
    for rank, part in enumerate(written):
        if part.plan != plan.digest:
            raise CheckpointError(f"rank {rank} has written by another plan than rank 0")
        if twice := files.keys() & part.files.keys():
            raise CheckpointError(f"{min(twice)} was written by rank {rank} and by one before it")
        files |= part.files
    return Manifest(
        **fields,
        health=not any(part.non_finite for part in written),
        num_bytes=sum(record.num_bytes for record in files.values()),
        versions=versions,
        files=files,
        tensors={
            group: {name: _complete(group, name, record, written) for name, record in records.items()}
            for group, records in plan.tensors.items()
        },
    )


def _complete(group: str, name: str, record: TensorRecord, written: Sequence[Written]) -> TensorRecord:
    """The record of a tensor with its parts. Parts without a rule are those that the ranks have reported."""
    if record.ruled is not None or record.chunks:
        return record
    stored = record.alias_of or name
    chunks = tuple(part.chunks[group][stored] for part in written if stored in part.chunks[group])
    if not are_exact_cover([(chunk.offset, chunk.shape) for chunk in chunks], record.shape):
        boxes = ", ".join(f"{list(chunk.shape)} at {list(chunk.offset)}" for chunk in chunks[:5])
        raise CheckpointError(
            f"what the ranks hold of {group}/{name} does not make up its shape {list(record.shape)}:"
            f" {boxes or 'nothing'}"
        )
    return replace(record, chunks=chunks)


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint may depend on."""
    versions = {"python": platform.python_version(), DISTRIBUTION: __version__}
    for name in ("torch", "accelerate", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a copy of the library without metadata
    return versions
