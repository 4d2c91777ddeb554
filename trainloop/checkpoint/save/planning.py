"""Makes the plan of a save, and keeps it for the next saves, whose tensors are nearly always the same."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...ranks import collectives
from ..content import Content, Described, is_dtensor
from ..format.boxes import slices
from ..format.rules import shard_file
from ..format.tables import Chunk, TensorRecord
from ..sharding import Boxes, is_first_replica
from .plan import Aliases, Plan, make_plan


@dataclass(frozen=True)
class Piece:
    """The part of a sharded group's tensor that this rank writes."""

    name: str
    chunk: Chunk
    index: tuple[slice, ...] | None
    """Index of the piece in this rank's local tensor. None: all of it."""


class Planner:
    """The plan of the last save. It is made again if names, shapes, dtypes, placements or tied weights have changed.

    Attributes:
        described: The description that must be the same on all ranks.
        digest: Digest of `described`.
        irregular: Group and name of the tensors whose part on this rank is not where their layout says.
        plan: What each rank writes.
        pieces: By group of shards: the pieces that this rank writes.
    """

    described: Described
    digest: int
    irregular: list[tuple[str, str]]
    plan: Plan
    pieces: dict[str, list[Piece]]

    def __init__(self) -> None:
        self._seen: Any = None
        self._planned_for: Any = None

    def look_at(self, content: Content) -> None:
        """Describe the content to be saved.

        Raises:
            TypeError, ValueError: It cannot be saved.
        """
        self._rank, self._world_size = collectives.rank(), collectives.world_size()
        described = content.describe(self._world_size)
        in_order = [(group, *tensors.items()) for group, tensors in described.items()]
        seen = (self._rank, self._world_size, in_order)
        if seen != self._seen:
            self._seen, self.described, self._planned_for = seen, described, None
            self.digest = zlib.crc32(repr(described).encode())
            self.irregular = self._find_irregular(content)

    def make(self, content: Content, aliases: Aliases, irregular: Collection[tuple[str, str]]) -> None:
        """Make the plan, unless it already exists.

        Args:
            content: The content that was passed to `look_at`.
            aliases: Tensors that are stored under another name, the same on each rank.
            irregular: The irregular tensors of all ranks.
        """
        planned_for = (list(content.weights), aliases, set(content.of_rank_zero), sorted(irregular))
        if planned_for != self._planned_for:
            self.plan = make_plan(
                self.described, content.weights, aliases, content.of_rank_zero, irregular, self._world_size
            )
            self.pieces = {group: self._pieces(content, group) for group in content.shards}
            self._planned_for = planned_for

    def _find_irregular(self, content: Content) -> list[tuple[str, str]]:
        boxes, found = Boxes(), []
        for group, tensors in content.shards.items():
            for name, tensor in tensors.items():
                layout = self.described[group][name][2]
                if layout is not None and not layout.irregular:
                    held, expected = boxes.of(tensor), layout.box_of(self._rank, tensor.shape)
                    if held != expected and not (0 in held[1] and 0 in expected[1]):
                        found.append((group, name))
        return found

    def _pieces(self, content: Content, group: str) -> list[Piece]:
        boxes, pieces = Boxes(), []
        for name, tensor in content.shards[group].items():
            held = boxes.of(tensor)
            chunk = self._chunk(group, name, self.plan.tensors[group][name], tensor, held)
            if chunk is not None:
                box = (chunk.offset, chunk.shape)
                pieces.append(Piece(name, chunk, None if box == held else slices(box, held[0])))
        return pieces

    def _chunk(self, group: str, name: str, record: TensorRecord, tensor: Any, held: Any) -> Chunk | None:
        path = shard_file(group, self._rank)
        if record.alias_of is not None:
            return None
        if record.ruled is not None:
            return record.part_of(self._rank)
        if record.chunks:
            return record.chunks[0] if record.chunks[0].file == path else None
        is_mine = is_first_replica(tensor) if is_dtensor(tensor) else self._rank == 0
        return Chunk(path, name, *held) if is_mine and 0 not in held[1] else None
