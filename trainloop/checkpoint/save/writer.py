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
"""How many tensors a message names."""
_METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True)
class Written:
    """What one rank has on the disk."""

    files: dict[str, FileRecord]
    chunks: dict[str, dict[str, Chunk]]
    """Of tensors for which there is no rule."""
    plan: int
    """Digest of the plan by which it was written."""
    non_finite: list[str]
    """Names of the tensors that had to be finite and are not; the first few."""


def write_draft(fs: FileSystem, folder: Path, draft: Draft) -> Written:
    """Write and sync the files of one rank.

    Args:
        fs: The disk.
        folder: The temporary folder, which all ranks share.
        draft: What to write; its error, if it has one, is raised.
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
    for path in draft.outputs:  # when all are written: the disk then commits them together
        fs.sync_path(folder / path)
    for parent in parents:
        fs.sync_dir(parent)
    return Written(files, draft.chunks, draft.plan, non_finite[:NUM_TOLD])


def write_file(fs: FileSystem, path: Path, buffers: Sequence[Buffer], sync: bool = True) -> FileRecord:
    """Write a file, and take the checksum of what was meant to be written while the disk is busy."""
    checksum = BackgroundCrc32(buffers)
    try:
        fs.write(path, buffers, sync)
    except OSError as ex:
        ex.filename = ex.filename or str(path)  # a full disk is not told with the name of the file
        raise
    finally:
        crc32 = checksum.result()
    return FileRecord(sum(map(len, buffers)), crc32)


def make_manifest(plan: Plan, written: Sequence[Written], *, versions: Mapping[str, str], **fields: Any) -> Manifest:
    """Describe a checkpoint that all ranks have written. Each rank has checked its parts against the plan, so nothing
    is looked at here for each part.

    Args:
        plan: Who was to write what.
        written: By rank.
        versions: Of the libraries.
        **fields: What else a `Manifest` has, besides health and the tables.

    Raises:
        CheckpointError: The ranks had different plans, a file was written by two ranks, or a tensor not by exactly one
            of them.
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
    """A tensor with its parts; those that no rule says are the ones that the ranks have told."""
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
    """Versions of what a checkpoint may depend on."""
    versions = {"python": platform.python_version(), DISTRIBUTION: __version__}
    for name in ("torch", "accelerate", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a copy without metadata
    return versions
