"""Where the parts of tensors are on the ranks, and which rank writes what."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .content import is_dtensor
from .format.boxes import Box


def split_by_bytes(sizes: Sequence[int], num_parts: int) -> list[int]:
    """Distribute items over parts of about equal size: the largest first, each into the part that is smallest so far.

    Returns:
        The part of each item. If parts stay empty, they are the last ones.
    """
    heap = [(0, part) for part in range(num_parts)]
    parts = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, parts[item] = heap[0]
        heapq.heapreplace(heap, (total + max(sizes[item], 1), parts[item]))
    return parts


def find_aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one (tied weights), each with the name of the earlier.

    Views that only share or overlap a storage are separate tensors.
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
    """This rank's part of a tensor, sharing its memory. For a plain tensor, all of it."""
    # `no_grad`, and `detach` last, because `detach` takes 50 times as long on a DTensor.
    return (tensor.to_local() if is_dtensor(tensor) else tensor).detach()  # type: ignore[attr-defined]


def local_box(tensor: torch.Tensor) -> Box:
    """The box of `local_tensor(tensor)` in the whole tensor."""
    return Boxes().of(tensor)


class Boxes:
    """Finds the boxes of this rank's parts. Many tensors are alike, and torch is asked only once for them."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Box]] = {}

    def of(self, tensor: torch.Tensor) -> Box:
        """The box of `local_tensor(tensor)` in the whole tensor."""
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
    """Whether this rank is the first of the ranks with the same part of a DTensor (HSDP: in the first replica)."""
    assert is_dtensor(tensor)
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    placements = tensor.placements  # type: ignore[attr-defined]
    return coordinate is not None and not any(
        index for index, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )
