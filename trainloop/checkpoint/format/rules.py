"""Rules that describe how tensors are cut into parts for the ranks. A rule has the same size for any world size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .boxes import Box
from .checks import shown, sizes, whole
from .limits import MAX_DIMS, MAX_FILES


def shard_file(group: str, rank: int) -> str:
    """Path of one rank's part of a group of shards."""
    return f"{group}/rank_{rank:05d}.safetensors"


def parse_shard_file(path: str) -> tuple[str, int] | None:
    """Group and rank of a shard file. None: it is another file."""
    group, _, rest = path.partition("/rank_")
    digits = rest.removesuffix(".safetensors")
    is_one = digits.isdecimal() and len(digits) < 10 and path == shard_file(group, int(digits))
    return (group, int(digits)) if is_one else None


@dataclass(frozen=True)
class Cut:
    """A cut of all parts along one dimension of the tensor."""

    dim: int
    rows: int
    """Size of each new part along `dim`. The last part may be smaller."""
    stride: int
    """Distance between the ranks that write two neighbouring parts."""


@dataclass(frozen=True)
class Rule:
    """Cuts a tensor into parts, which are in the files of different ranks.

    Part (i, j, ...) is the i-th part of the first cut, then the j-th part of the second cut of that, and so on. Rank
    `first + i * stride_0 + j * stride_1 + ...` writes it.
    """

    first: int
    cuts: tuple[Cut, ...]

    def counts(self, shape: Sequence[int]) -> list[int]:
        """For each cut, the largest number of parts that it makes of one part."""
        extent, counts = list(shape), []
        for cut in self.cuts:
            counts.append(-(-extent[cut.dim] // cut.rows))
            extent[cut.dim] = min(extent[cut.dim], cut.rows)
        return counts

    def last_rank(self, shape: Sequence[int]) -> int:
        """The highest rank that may write a part."""
        strides = (cut.stride for cut in self.cuts)
        return self.first + sum((n - 1) * stride for n, stride in zip(self.counts(shape), strides, strict=True))

    def part_of(self, rank: int, shape: Sequence[int]) -> Box | None:
        """The part of a tensor that a rank writes. None: it writes none."""
        counts, rest = self.counts(shape), rank - self.first
        index = [0] * len(self.cuts)
        for i in sorted(range(len(index)), key=lambda i: (-self.cuts[i].stride, -counts[i])):
            index[i], rest = divmod(rest, self.cuts[i].stride)
            if not 0 <= index[i] < counts[i]:
                return None
        if rest:
            return None
        offset, extent = [0] * len(shape), list(shape)
        for i, cut in zip(index, self.cuts, strict=True):
            offset[cut.dim] += i * cut.rows
            extent[cut.dim] = min(cut.rows, extent[cut.dim] - i * cut.rows)
            if extent[cut.dim] <= 0:
                return None
        return tuple(offset), tuple(extent)

    def parts_in(self, box: Box, shape: Sequence[int]) -> Iterator[tuple[int, Box]]:
        """The parts of a tensor that may overlap a box, each with its rank."""
        yield from self._walk(0, self.first, (0,) * len(shape), tuple(shape), box)

    def _walk(
        self, level: int, rank: int, offset: tuple[int, ...], extent: tuple[int, ...], box: Box
    ) -> Iterator[tuple[int, Box]]:
        if level == len(self.cuts):
            yield rank, (offset, extent)
            return
        cut = self.cuts[level]
        dim, start, size = cut.dim, offset[cut.dim], extent[cut.dim]
        begin, end = max(box[0][dim], start) - start, min(box[0][dim] + box[1][dim], start + size) - start
        for i in range(begin // cut.rows, -(-end // cut.rows)) if begin < end else ():
            part = (*offset[:dim], start + i * cut.rows, *offset[dim + 1 :])
            rows = (*extent[:dim], min(cut.rows, size - i * cut.rows), *extent[dim + 1 :])
            yield from self._walk(level + 1, rank + i * cut.stride, part, rows, box)

    def has_one_part_a_rank(self, shape: Sequence[int]) -> bool:
        """Whether no rank writes two parts, judging by the strides: each stride must be at least as long as the range
        of the next smaller one.
        """
        by_stride = sorted(zip((cut.stride for cut in self.cuts), self.counts(shape), strict=True), reverse=True)
        return all(outer[0] >= inner[0] * inner[1] for outer, inner in itertools.pairwise(by_stride))


def rule_as_json(rule: Rule) -> dict[str, Any]:
    """The JSON that `read_rule` reads."""
    return {"first": rule.first, "cuts": [[cut.dim, cut.rows, cut.stride] for cut in rule.cuts]}


def read_rule(name: str, first: Any, cuts: Any, shape: Sequence[int]) -> Rule:
    """Read the rule for a tensor from the JSON of a manifest.

    Raises:
        TypeError, ValueError: It is not a valid rule for a tensor of this shape.
    """
    if type(cuts) is not list or not 0 < len(cuts) <= MAX_DIMS or 0 in shape:
        raise ValueError(f"the cuts of {name} must be a list for a tensor with elements, but are {shown(cuts)}")
    parsed = []
    for cut in cuts:
        dim, rows, stride = sizes(name, cut)
        if dim >= len(shape) or rows < 1 or stride < 1:
            raise ValueError(f"{name} of shape {shown(list(shape))} cannot be cut by {shown(cut)}")
        parsed.append(Cut(dim, rows, stride))
    rule = Rule(whole("first", first), tuple(parsed))
    if math.prod(rule.counts(shape)) > MAX_FILES or not rule.has_one_part_a_rank(shape):
        raise ValueError(f"{name} is cut into more parts than there can be files: {shown(cuts)}")
    return rule
