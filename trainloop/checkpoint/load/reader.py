"""Reads a checkpoint into tensors. Their layout over the ranks may differ from that at the save."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...ranks import collectives
from ..format.boxes import Box, overlap, slices
from ..format.catalog import follow_links, is_there, read_manifest
from ..format.dtypes import DTYPES, dtype_name
from ..format.foreign import describe_folder, has_manifest
from ..format.layout import Manifest, state_file
from ..format.tables import TensorRecord
from ..format.tensorfile import open_tensors
from ..format.verification import Verify, check_stored, find_problems, read_state, stored_in
from ..sharding import Boxes, local_tensor

_NUM_TOLD = 5  # names in an error
_Read = tuple[str, Box, torch.Tensor]
"""Key in the file, the wanted box of the stored tensor, and the memory to fill."""


class RemovedError(CheckpointError):
    """The run that owns a checkpoint removed it, or saved its step again, while it was read."""


class Checkpoint:
    """A checkpoint to read from. Its methods don't communicate, so a single rank may call them.

    Attributes:
        folder: The checkpoint's folder.
        manifest: Its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a checkpoint by its folder. Call it in any single process. It reads only the manifest.

        Raises:
            CheckpointError: It is not a checkpoint, or its manifest cannot be read.
        """
        if not has_manifest(Path(folder)):
            raise CheckpointError(f"{folder} is not a checkpoint of trainloop: it {describe_folder(Path(folder))}.")
        folder = follow_links(Path(folder))
        try:
            return cls(folder, read_manifest(folder))
        except CheckpointError as ex:
            raise CheckpointError(f"{folder}: {ex}.") from ex

    def find_problems(self, verify: Verify = "full") -> list[str]:
        """Check the files. Returns one sentence per problem. This process alone checks all files, as thoroughly as
        `verify` says ("full", "size" or "off").
        """
        return find_problems(self.folder, self.manifest, self.manifest.files, verify)

    def tensors(self, group: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors of a group. A tied tensor appears under each of its names.

        Raises:
            CheckpointError: There is no such group.
        """
        return {name: (record.shape, DTYPES[record.dtype]) for name, record in self.records(group).items()}

    def records(self, group: str) -> Mapping[str, TensorRecord]:
        """The records of a group's tensors (where each is stored), by name.

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
        """Fill tensors with the saved tensors of a group, bit for bit.

        Args:
            group: A group of weights or shards.
            targets: All tensors of the group, by name. Of a DTensor only this rank's part is read, whatever the parts
                were at the save.

        Raises:
            RemovedError: The checkpoint's run has removed it in the meantime.
            CheckpointError: Names, shapes or dtypes differ from the saved ones, or a file does not match the manifest;
                nothing was changed then. Or a file cannot be read.
        """
        records = self.records(group)
        self._check(group, records, targets)
        reads: dict[str, list[_Read]] = defaultdict(list)
        boxes = Boxes()
        for name, target in targets.items():
            local, box = local_tensor(target), boxes.of(target)
            for chunk in records[name].parts_in(box):
                wanted = overlap((chunk.offset, chunk.shape), box)
                if wanted is not None:
                    begin = tuple(b - o for b, o in zip(wanted[0], chunk.offset, strict=True))
                    reads[chunk.file].append((chunk.key, (begin, wanted[1]), local[slices(wanted, box[0])]))
        stored = stored_in(reads, records)
        try:
            for path in reads:
                with open_tensors(self.folder, path) as file:
                    check_stored(file, stored[path])
            for path, parts in reads.items():
                with open_tensors(self.folder, path) as file:
                    check_stored(file, stored[path])
                    for part in parts:
                        file.read_box(*part)
        except CheckpointError:
            self.check_there()  # if the checkpoint is gone, report that instead
            raise
        self.check_there()

    def check_there(self) -> None:
        """Raise if the folder no longer has this checkpoint. Otherwise, everything read so far is from one commit.

        Raises:
            RemovedError: The run has removed it, or saved its step again.
        """
        if not is_there(self.folder, self.manifest.seal):
            raise RemovedError(f"{self.folder} was removed or saved again while it was read, by its run. Try again.")

    def global_state(self) -> Any:
        """The nested state of the run."""
        return self._state(state_file(None))

    def rank_state(self, rank: int) -> Any:
        """The nested state of a rank. None if another number of ranks saved it."""
        return self.saved_rank_state(rank) if self.manifest.world_size == collectives.world_size() else None

    def saved_rank_state(self, rank: int) -> Any:
        """The nested state of `rank`, one of the ranks that saved."""
        return self._state(state_file(rank))

    def _check(self, group: str, records: Mapping[str, TensorRecord], targets: Mapping[str, torch.Tensor]) -> None:
        differing = [
            f"{name} is {record.dtype} {list(record.shape)} there,"
            f" but {dtype_name(targets[name].dtype)} {list(targets[name].shape)} here"
            for name, record in records.items()
            if name in targets
            and (record.dtype, record.shape) != (dtype_name(targets[name].dtype), tuple(targets[name].shape))
        ]
        missing, frozen = targets.keys() - records.keys(), self.manifest.frozen.keys()
        complaints = [
            _told("not in the checkpoint", sorted(missing - frozen)),
            _told("left out as frozen: `build_model` of the saved run gives them", sorted(missing & frozen)),
            _told("only in the checkpoint", sorted(records.keys() - targets.keys())),
            _told("of another shape or dtype", differing),
        ]
        if any(complaints):
            raise CheckpointError(
                f'The tensors of group "{group}" in {self.folder} are not those to be filled; nothing was changed.'
                f" {' '.join(filter(None, complaints))}"
            )

    def _state(self, path: str) -> Any:
        try:
            if path not in self.manifest.files:
                raise CheckpointError(f"{self.folder} has no {path}.")
            state = read_state(self.folder, path, self.manifest.files)
        except (OSError, CheckpointError) as ex:
            self.check_there()  # if the checkpoint is gone, report that instead
            raise CheckpointError(f"{self.folder / path} cannot be read: {ex}") from ex
        self.check_there()
        return state


def _told(what: str, names: list[str]) -> str:
    """A sentence with the first few names. Empty if there are none."""
    if not names:
        return ""
    more = f", and {len(names) - _NUM_TOLD} more" if len(names) > _NUM_TOLD else ""
    return f"{len(names)} {what}: {', '.join(names[:_NUM_TOLD])}{more}."
