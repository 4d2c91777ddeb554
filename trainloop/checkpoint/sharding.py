"""Where the parts of tensors lie on the ranks, and which rank writes what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .content import is_dtensor
from .format.boxes import Box


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
