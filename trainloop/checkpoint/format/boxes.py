"""Boxes: rectangular parts of a tensor."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Box: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"
"""Offset and shape of a part of a tensor."""

_MAX_CELLS_EACH = 64
"""Limit of cells per box. Parts that come from sharding have one cell each. A hostile file could otherwise describe
more cells than a computer can count.
"""


def overlap(box: Box, other: Box) -> Box | None:
    """The intersection of two boxes. None: they have no element in common."""
    begin = tuple(map(max, box[0], other[0]))
    end = tuple(min(a + m, b + n) for a, m, b, n in zip(box[0], box[1], other[0], other[1], strict=True))
    shape = tuple(e - b for b, e in zip(begin, end, strict=True))
    return (begin, shape) if all(n > 0 for n in shape) else None


def slices(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """The index of `box` in a tensor whose first element lies at `origin`."""
    return tuple(slice(b - o, b - o + n) for b, n, o in zip(box[0], box[1], origin, strict=True))


def are_exact_cover(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether each element of a tensor with this shape lies in exactly one of the boxes.

    The borders of all boxes divide the tensor into cells, and each box takes some of them. The work is limited: with
    many more cells than boxes, the answer is False.
    """
    boxes = [box for box in boxes if 0 not in box[1]]
    if sum(math.prod(extent) for _, extent in boxes) != math.prod(shape):
        return False
    cuts = []
    for dim, size in enumerate(shape):
        borders = {0, size, *(b[dim] for b, _ in boxes), *(b[dim] + s[dim] for b, s in boxes)}
        if min(borders) < 0 or max(borders) > size:
            return False
        cuts.append(sorted(borders))
    num_cells = math.prod(len(borders) - 1 for borders in cuts)
    if num_cells > _MAX_CELLS_EACH * max(1, len(boxes)):
        return False
    taken: set[tuple[int, ...]] = set()
    for begin, extent in boxes:
        ranges = [
            range(bisect_left(borders, b), bisect_left(borders, b + n))
            for borders, b, n in zip(cuts, begin, extent, strict=True)
        ]
        for cell in itertools.product(*ranges):
            if cell in taken:
                return False
            taken.add(cell)
    return len(taken) == num_cells
