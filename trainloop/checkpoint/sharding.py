"""Where the parts of tensors lie: who writes which, and whether they make up the whole."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .content import is_dtensor

Box: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"
"""Offset and shape of a part of a tensor."""


def split_by_bytes(sizes: Sequence[int], num_parts: int) -> list[int]:
    """Put items into parts of about equal size: the largest first, each into the part that is smallest so far.

    Returns:
        The part of each item. Parts that stay empty are the last ones.
    """
    totals = [0] * num_parts
    parts = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        part = totals.index(min(totals))
        parts[item] = part
        totals[part] += max(sizes[item], 1)
    return parts


def find_aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one (tied weights), with the name of that one.

    Views of one storage that only overlap, or not even that, are tensors of their own.
    """
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        local = local_tensor(tensor) if is_dtensor(tensor) else tensor
        if local.numel():
            layout = (local.stride(), local.shape, local.dtype, local.device, tensor.shape)
            kept = first.setdefault((local.data_ptr(), *layout), name)
            if kept != name:
                aliases[name] = kept
    return aliases


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory; all of it if it is no DTensor."""
    detached = tensor.detach()
    return detached.to_local() if is_dtensor(detached) else detached  # type: ignore[attr-defined]


def local_box(tensor: torch.Tensor) -> Box:
    """Where `local_tensor(tensor)` lies in the whole."""
    if not is_dtensor(tensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def is_first_replica(tensor: torch.Tensor) -> bool:
    """Whether this rank is the first of those that hold the same part of a DTensor (HSDP: of the first replica)."""
    assert is_dtensor(tensor)
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    placements = tensor.placements  # type: ignore[attr-defined]
    return coordinate is not None and not any(
        index for index, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )


def overlap(box: Box, other: Box) -> Box | None:
    """The box in which both lie; None: they have no element in common."""
    begin = tuple(map(max, box[0], other[0]))
    end = tuple(min(a + m, b + n) for a, m, b, n in zip(box[0], box[1], other[0], other[1], strict=True))
    shape = tuple(e - b for b, e in zip(begin, end, strict=True))
    return (begin, shape) if all(n > 0 for n in shape) else None


def slices(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """The index of `box` in a tensor whose first element lies at `origin`."""
    return tuple(slice(b - o, b - o + n) for b, n, o in zip(box[0], box[1], origin, strict=True))


def are_exact_cover(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether every element of a tensor of this shape lies in exactly one of the boxes.

    The borders of all boxes cut the tensor into cells, of which each box takes some; parts made by sharding take one
    each, so this is fast for any number of them.
    """
    boxes = [box for box in boxes if 0 not in box[1]]
    if 0 in shape:
        return not boxes
    cuts = []
    for dim, size in enumerate(shape):
        borders = {0, size, *(b[dim] for b, _ in boxes), *(b[dim] + s[dim] for b, s in boxes)}
        if min(borders) < 0 or max(borders) > size:
            return False
        cuts.append(sorted(borders))
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
    return len(taken) == math.prod(len(borders) - 1 for borders in cuts)
