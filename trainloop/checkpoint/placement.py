"""The layout of a tensor over the ranks, as a value that is the same on every rank and can be compared and stored
without the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .format.boxes import Box


@dataclass(frozen=True)
class Layout:
    """The device mesh of a DTensor, and the role of each of its dimensions. Dimensions of size 1 are left out."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """The rank at coordinates (i, j, ...) is `i * strides[0] + j * strides[1] + ...`."""
    shards: tuple[int | None, ...]
    """The tensor's dimension that each mesh dimension shards. None: that mesh dimension replicates."""
    irregular: str = ""
    """Text for placements that the fields above can't describe, or for a mesh without all ranks. "": none of these."""

    def box_of(self, rank: int, shape: Sequence[int]) -> Box:
        """The part of a tensor on a rank, if all parts but the last ones have the same size. The part is empty if the
        tensor is too small for all ranks.
        """
        offset, extent, full = [0] * len(shape), list(shape), list(shape)
        for size, stride, dim in zip(self.sizes, self.strides, self.shards, strict=True):
            if dim is not None:
                full[dim] = -(-full[dim] // size)
                begin = min(full[dim] * (rank // stride % size), extent[dim])
                offset[dim] += begin
                extent[dim] = min(full[dim], extent[dim] - begin)
        return tuple(offset), tuple(extent)


def replicated(world_size: int) -> Layout:
    """The layout of a plain tensor, of which each rank has a copy."""
    return Layout((world_size,), (1,), (None,)) if world_size > 1 else Layout((), (), ())


class Layouts:
    """Finds the layouts of DTensors. Many tensors have the same layout, which is made only once."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._known: dict[Any, tuple[Any, Layout]] = {}

    def of(self, tensor: Any) -> Layout:
        """The layout of a DTensor."""
        mesh, placements = tensor.device_mesh, tensor.placements
        known = self._known.get((id(mesh), placements))
        if known is None:
            known = self._known[id(mesh), placements] = (mesh, self._make(mesh.mesh, placements))
        return known[1]

    def _make(self, ranks: torch.Tensor, placements: Sequence[Any]) -> Layout:
        from torch.distributed.tensor import Shard

        sizes, strides, shards = [], [], []
        expected = ranks.new_zeros(())
        for dim, (size, placement) in enumerate(zip(ranks.shape, placements, strict=True)):
            if size == 1:
                continue
            stride = int(ranks.select(dim, 1).flatten()[0] - ranks.flatten()[0])
            steps = torch.arange(size) * stride
            expected = expected + steps.view(size, *(1,) * (ranks.dim() - dim - 1))
            sizes.append(size)
            strides.append(stride)
            shards.append(placement.dim if type(placement) is Shard else None)
            if type(placement) is not Shard and not placement.is_replicate():
                return Layout(tuple(ranks.shape), (), (), str(placements))
        is_usual = ranks.numel() == self._world_size and all(stride > 0 for stride in strides)
        if not is_usual or not torch.equal(ranks, expected.expand(ranks.shape).to(ranks.dtype)):
            return Layout(tuple(ranks.shape), (), (), str(placements))
        return Layout(tuple(sizes), tuple(strides), tuple(shards))
