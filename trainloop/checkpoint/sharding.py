"""Where the parts of tensors lie on the ranks, and which rank writes what."""

from __future__ import annotations

import heapq
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
    heap = [(0, part) for part in range(num_parts)]
    parts = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, parts[item] = heap[0]
        heapq.heapreplace(heap, (total + max(sizes[item], 1), parts[item]))
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


@torch.no_grad()
def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory; all of it if it is no DTensor."""
    # Without gradients, and `detach` last: on a DTensor it takes 50 times as long.
    return (tensor.to_local() if is_dtensor(tensor) else tensor).detach()  # type: ignore[attr-defined]


def local_box(tensor: torch.Tensor) -> Box:
    """Where `local_tensor(tensor)` lies in the whole."""
    return Boxes().of(tensor)


class Boxes:
    """Finds where the parts of this rank lie in the whole tensors. Many tensors are alike, and torch is asked once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Box]] = {}

    def of(self, tensor: torch.Tensor) -> Box:
        """Where `local_tensor(tensor)` lies in the whole."""
        if not is_dtensor(tensor):
            return (0,) * tensor.dim(), tuple(tensor.shape)
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        key = (id(mesh), placements, tensor.shape)
        if key not in self._known:
            from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

            shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
            self._known[key] = (mesh, (tuple(offset), tuple(shape)))
        return self._known[key][1]


def is_first_replica(tensor: torch.Tensor) -> bool:
    """Whether this rank is the first of those that hold the same part of a DTensor (HSDP: of the first replica)."""
    assert is_dtensor(tensor)
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    placements = tensor.placements  # type: ignore[attr-defined]
    return coordinate is not None and not any(
        index for index, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )
