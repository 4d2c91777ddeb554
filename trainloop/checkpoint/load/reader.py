"""Reads a checkpoint into tensors that may lie on the ranks in another way than when it was saved."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...ranks import collectives
from ..format.catalog import read_manifest
from ..format.foreign import describe_folder
from ..format.integrity import Verify, find_problems
from ..format.layout import MANIFEST, Manifest, TensorRecord, state_file, tensors_beside
from ..format.nested import decode
from ..format.tensorfile import as_real, dtype_name, load
from ..sharding import Box, local_box, local_tensor, overlap, slices

_NUM_TOLD = 5  # names in an error
_Read = tuple[str, Box, tuple[int, ...], torch.Tensor]
"""Key in the file, the box that is wanted, where the stored chunk begins, and the memory to fill."""


class Checkpoint:
    """A checkpoint to be read. Its methods send nothing, so any rank may call them alone.

    Attributes:
        folder: Where it lies.
        manifest: What it says of itself.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a checkpoint by its folder, in one process and without looking at more than its manifest.

        Raises:
            CheckpointError: It is none, or its manifest cannot be read.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder} is not a checkpoint of trainloop: it {describe_folder(folder)}.")
        try:
            return cls(folder, read_manifest(folder))
        except CheckpointError as ex:
            raise CheckpointError(f"{folder}: {ex}.") from ex

    def find_problems(self, verify: Verify = "full") -> list[str]:
        """What is wrong with its files, a sentence each; this process looks at all of them, as far as `verify` says
        ("full", "size" or "off").
        """
        return find_problems(self.folder, self.manifest.files, verify)

    def tensors(self, group: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors of a group, tied ones under each of their names.

        Raises:
            CheckpointError: There is no such group.
        """
        return {name: (record.shape, getattr(torch, record.dtype)) for name, record in self.records(group).items()}

    def records(self, group: str) -> Mapping[str, TensorRecord]:
        """Where the tensors of a group lie, by name.

        Raises:
            CheckpointError: There is no such group.
        """
        try:
            return self.manifest.tensors[group]
        except KeyError:
            groups = ", ".join(self.manifest.tensors) or "none"
            raise CheckpointError(f'{self.folder} has no tensors in a group "{group}"; its groups: {groups}.') from None

    @torch.no_grad()
    def read_into(self, group: str, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors with what was saved of a group, bit by bit.

        Args:
            group: Of weights or shards.
            targets: By name, all tensors of the group. Of a DTensor only the part of this rank is read, whatever the
                parts were when it was saved.

        Raises:
            CheckpointError: Names, shapes or dtypes are not those that were saved, and nothing was changed; or a file
                cannot be read.
        """
        records = self.records(group)
        self._check(group, records, targets)
        reads: dict[str, list[_Read]] = defaultdict(list)
        for name, target in targets.items():
            local, box = local_tensor(target), local_box(target)
            for chunk in records[name].chunks:
                wanted = overlap((chunk.offset, chunk.shape), box)
                if wanted is not None:
                    reads[chunk.file].append((chunk.key, wanted, chunk.offset, local[slices(wanted, box[0])]))
        for file, parts in reads.items():
            _read_file(self.folder / file, parts)

    def global_state(self) -> Any:
        """The nested state of the run."""
        return self._state(state_file(None))

    def rank_state(self, rank: int) -> Any:
        """The nested state of a rank; None if it was saved by another number of ranks than there are now."""
        return self.saved_rank_state(rank) if self.manifest.world_size == collectives.world_size() else None

    def saved_rank_state(self, rank: int) -> Any:
        """The nested state of `rank`, one of those that there were."""
        return self._state(state_file(rank))

    def _check(self, group: str, records: Mapping[str, TensorRecord], targets: Mapping[str, torch.Tensor]) -> None:
        differing = [
            f"{name} is {record.dtype} {list(record.shape)} there,"
            f" but {dtype_name(targets[name].dtype)} {list(targets[name].shape)} here"
            for name, record in records.items()
            if name in targets
            and (record.dtype, record.shape) != (dtype_name(targets[name].dtype), tuple(targets[name].shape))
        ]
        complaints = [
            _told("not in the checkpoint", sorted(targets.keys() - records.keys())),
            _told("only in the checkpoint", sorted(records.keys() - targets.keys())),
            _told("of another shape or dtype", differing),
        ]
        if any(complaints):
            raise CheckpointError(
                f'The tensors of group "{group}" in {self.folder} are not those to be filled; nothing was changed.'
                f" {' '.join(filter(None, complaints))}"
            )

    def _state(self, path: str) -> Any:
        beside = tensors_beside(path)
        tensors = load(self.folder / beside) if beside in self.manifest.files else {}
        try:
            return decode(json.loads((self.folder / path).read_bytes()), tensors)
        except (OSError, ValueError, KeyError) as ex:
            raise CheckpointError(f"{self.folder / path} cannot be read: {ex}") from ex


def _told(what: str, names: list[str]) -> str:
    """A sentence that names the first few; empty if there are none."""
    if not names:
        return ""
    more = f", and {len(names) - _NUM_TOLD} more" if len(names) > _NUM_TOLD else ""
    return f"{len(names)} {what}: {', '.join(names[:_NUM_TOLD])}{more}."


def _read_file(path: Path, reads: list[_Read]) -> None:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for key, box, origin, memory in reads:
                stored = file.get_slice(key)[slices(box, origin)] if box[1] else file.get_tensor(key)
                as_real(memory).copy_(stored)
    except (OSError, safetensors.SafetensorError) as ex:
        raise CheckpointError(f"{path} cannot be read: {ex}") from ex
