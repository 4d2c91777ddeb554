"""One save, from the live tensors to the durable checkpoint.

begin      the ranks compare what they want to save; rank 0 checks the free space and makes the temporary folder
snapshot   each rank copies its part to the CPU
write      each rank writes and syncs its files
commit     rank 0 checks that nothing is missing, writes the manifest, renames: the checkpoint exists
"""

from __future__ import annotations

import logging
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ...errors import CheckpointError
from ..agreement import Ranks
from ..clock import Clock
from ..content import Content
from ..disk.fs import FileSystem
from ..disk.housekeeping import publish, temporary_folder
from ..disk.lock import FolderLock
from ..format.catalog import Catalog
from ..format.checks import is_inner_path
from ..format.layout import MANIFEST, TABLES, manifest_texts, parse_manifest
from ..sharding import find_aliases
from .plan import Plan
from .planning import Planner
from .replicas import Checksums, check_replicas, digests, do_agree, replica_checksums
from .snapshot import Buffers, Draft, Output, State, take_snapshot
from .writer import NUM_TOLD, Written, library_versions, make_manifest, write_draft, write_file

_Begun: TypeAlias = "tuple[str, int, dict[str, dict[str, str]], list[tuple[str, str]]]"
"""Token, number of the commit, aliases, and the tensors that no rule can describe."""
_Prepared: TypeAlias = "tuple[int, dict[Any, bytes], int, list[tuple[str, str]]]"
"""Digests of the descriptions and of the replicas, bytes of nested state, and the irregular tensors."""
_SPARE_BYTES = 2**20
"""About the size of the manifest and the folders."""


class Saving:
    """A save in progress. Call `start` and `finish` on every rank; a thread may call `finish`.

    Attributes:
        step: The step of the checkpoint.
        token: Makes the names of temporary folders unique.
    """

    def __init__(
        self,
        fs: FileSystem,
        catalog: Catalog,
        step: int,
        about: Mapping[str, Any],
        clock: Clock,
        lock: FolderLock | None,
        planner: Planner,
    ) -> None:
        """
        Args:
            fs: The disk.
            catalog: The catalog of the folder to save into.
            step: The step of the checkpoint.
            about: Fields of the manifest that the caller knows.
            clock: Gives the commit its time.
            lock: The lock of the folder; None on the other ranks than 0.
            planner: It may have the plan of the last save.
        """
        self._fs, self._catalog, self._about, self._clock, self._lock = fs, catalog, dict(about), clock, lock
        self._planner, self._plan = planner, Plan({}, {}, [], 0)
        self.step, self.token = step, ""
        self.failure = f"The checkpoint of step {step} was not saved, earlier ones are untouched"

    def start(self, content: Content, extra: Mapping[str, str], buffers: Buffers, ranks: Ranks, copy: bool) -> None:
        """Begin the save and take the snapshot.

        Args:
            content: The content to save. With `copy`, it is not needed after the return.
            extra: More texts to write, by path.
            buffers: Memory for the copies.
            ranks: The ranks.
            copy: False: the live tensors do not change before `finish` has returned.

        Raises:
            CheckpointError: On every rank: the content cannot be saved, and nothing was written.
        """
        self._about["frozen"] = content.frozen
        state: State | None = None
        values: Checksums = {}

        def prepare() -> _Prepared:
            nonlocal state, values
            state = State(content, ranks.rank)
            self._planner.look_at(content)
            values = replica_checksums(content, ranks.world_size)
            return self._planner.digest, digests(values), state.num_bytes(), self._planner.irregular

        def begin(prepared: list[_Prepared]) -> _Begun | None:
            self._check_lock()
            if len({digest for digest, *_ in prepared}) > 1 or not do_agree(own for _, own, *_ in prepared):
                return None
            aliases = {group: find_aliases(tensors) for group, tensors in content.groups().items()}
            self._look_for_space(content.num_bytes(aliases) + sum(num_bytes for *_, num_bytes, _ in prepared))
            token = secrets.token_hex(4)
            self._fs.make_dir(temporary_folder(self._catalog.root, self.step, token))
            for info in self._catalog.infos():
                self._clock.go_to(info.time)
            irregular = {tensor for *_, tensors in prepared for tensor in tensors}
            return token, self._catalog.next_seq(), aliases, sorted(irregular)

        begun = ranks.do(prepare, begin, self.failure)
        if begun is None:  # only in this case does every rank send its list
            described = self._planner.described
            each = [(group, *item) for group, tensors in described.items() for item in tensors.items()]
            sums = [zlib.crc32(repr(item).encode()) for item in each]
            ranks.do(lambda: (sums, values), self._tell_difference, self.failure)
        assert begun is not None, "the difference was told"
        assert state is not None
        self.token, self._seq, aliases, irregular = begun
        try:
            self._planner.make(content, aliases, irregular)
            self._plan = self._planner.plan
            self._draft = take_snapshot(content, state, self._planner, buffers, ranks.rank, copy)
            if ranks.rank == 0:
                _add_extra(self._draft, extra)
        except Exception as ex:
            self._draft = Draft(error=ex)

    def finish(self, ranks: Ranks, logger: logging.Logger) -> list[Path]:
        """Write and commit.

        Returns:
            On rank 0: the replaced checkpoint, which must be discarded.

        Raises:
            CheckpointError: On every rank. It names the ranks that failed. The temporary folder is removed.
        """
        temporary = temporary_folder(self._catalog.root, self.step, self.token)
        replaced: list[Path] = []
        non_finite: list[str] = []

        def commit(written: list[Written]) -> None:
            self._check_lock()  # again, because writing may have taken minutes
            manifest = make_manifest(
                self._plan,
                written,
                **self._about,
                step=self.step,
                seq=self._seq,
                time=self._clock.now(),
                world_size=ranks.world_size,
                versions=library_versions(),
            )
            text, tables = manifest_texts(manifest)
            parse_manifest(text, tables)  # a manifest that a reader would refuse must not be committed
            write_file(self._fs, temporary / TABLES, [tables.encode()])
            write_file(self._fs, temporary / MANIFEST, [text.encode()])
            self._fs.sync_dir(temporary)
            replaced.extend(publish(self._fs, temporary, self.step, self.token))
            non_finite.extend(name for part in written for name in part.non_finite)

        try:
            ranks.do(lambda: write_draft(self._fs, temporary, self._draft), commit, self.failure)
        except CheckpointError:
            if ranks.rank == 0 and temporary.exists():
                try:
                    self._fs.remove_tree(temporary)
                except OSError as ex:
                    logger.warning(f"{temporary} is left over from a save that failed, and cannot be removed: {ex}")
            raise
        if non_finite:
            logger.warning(
                f"The checkpoint of step {self.step} is saved, but it is not healthy: there are infinities or NaN in"
                f" {', '.join(non_finite[:NUM_TOLD])}{', …' if len(non_finite) > NUM_TOLD else ''}. A restart loads the"
                " newest healthy checkpoint instead. That one is never removed."
            )
        return replaced

    def _check_lock(self) -> None:
        """Call on rank 0."""
        assert self._lock is not None
        self._lock.check()

    def _tell_difference(self, by_rank: list[tuple[list[int], Checksums]]) -> None:
        """On rank 0: raise for the first difference between the ranks. They must save the same tensors, or gathering
        would hang, and replicated tensors must be equal.
        """
        checksums = [described for described, _ in by_rank]
        own = [f"{group}/{name}" for group, tensors in self._planner.described.items() for name in tensors]
        for rank, other in enumerate(checksums):
            if other != checksums[0]:
                pairs = enumerate(zip(checksums[0], other, strict=False))
                first = next((i for i, (a, b) in pairs if a != b), min(len(own), len(other)))
                at = f"{own[first]}, as rank 0 has it" if first < len(own) else "one that rank 0 has not"
                raise CheckpointError(
                    f"names, shapes and dtypes of the tensors must be the same on every rank, but those of rank {rank}"
                    f" differ, first in {at}"
                )
        check_replicas(values for _, values in by_rank)

    def _look_for_space(self, num_bytes: int) -> None:
        """Call on rank 0."""
        needed, free = num_bytes + _SPARE_BYTES, self._fs.free_bytes(self._catalog.root)
        if needed > free:
            raise CheckpointError(
                f"it needs {needed / 2**20:,.1f} MiB, but the disk of {self._catalog.root} has {free / 2**20:,.1f} MiB"
                " free"
            )


def _add_extra(draft: Draft, extra: Mapping[str, str]) -> None:
    for path, text in extra.items():
        if path in draft.outputs or path in (MANIFEST, TABLES) or not is_inner_path(path):
            raise ValueError(f"`extra` must have free paths inside the checkpoint, but has {path}.")
        draft.outputs[path] = Output(text=text.encode())
