"""A fingerprint of a tensor's bits. It doesn't depend on how the tensor is sharded over the ranks.

The bits are read as words of 16 bits. A table maps each word to a random number, which is multiplied by a weight that
depends on the word's position in the whole tensor. The products are summed modulo 2^64. So each rank computes a part
from its shard, and the fingerprint is the sum of the parts. Without the table, a large tensor could be doubled and keep
its fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..ranks import collectives
from .content import is_dtensor
from .sharding import is_first_replica, local_box, local_tensor

_PIECE = 2**16  # words at a time; the intermediate results fit into a processor's cache
_HALF = 2**32
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64's, signed


@torch.no_grad()
def fingerprints(tensors: Sequence[torch.Tensor | None]) -> list[str]:
    """Fingerprints of whole tensors, 16 hexadecimal digits each. Call on every rank, with equally many tensors.

    For a plain tensor, rank 0's copy counts. If a tensor is None, its result has no meaning.
    """
    tables: dict[torch.device, torch.Tensor] = {}
    parts = [_part(tensor, tables) for tensor in tensors]
    halves = [float(half) for part in parts for half in divmod(part, _HALF)]
    sums = map(int, collectives.sum_over_ranks(halves))  # exact: far below 2^53
    return [f"{(high * _HALF + low) % 2**64:016x}" for high, low in zip(sums, sums, strict=True)]


def _part(tensor: torch.Tensor | None, tables: dict[torch.device, torch.Tensor]) -> int:
    """This rank's part of the sum, in [0, 2^64)."""
    if tensor is None or not (is_first_replica(tensor) if is_dtensor(tensor) else collectives.rank() == 0):
        return 0
    local, (offset, extent), shape = local_tensor(tensor), local_box(tensor), tuple(tensor.shape)
    if local.is_complex():
        local, offset, extent, shape = torch.view_as_real(local), (*offset, 0), (*extent, 2), (*shape, 2)
    missing = 2 - len(shape)  # the code below needs rows of words
    if missing > 0:
        local = local.reshape((1,) * missing + tuple(local.shape))
        offset, extent, shape = (0,) * missing + offset, (1,) * missing + extent, (1,) * missing + shape
    if not local.numel():
        return 0
    device, each = local.device, max(1, local.element_size() // 2)  # `each`: words per element
    offset, extent, shape = (*((*some[:-1], some[-1] * each) for some in (offset, extent, shape)),)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    places = torch.zeros((), dtype=torch.int64, device=device)  # positions of the words of a row
    for begin, size, stride in zip(offset[1:], extent[1:], strides[1:], strict=True):
        places = places[..., None] + torch.arange(begin, begin + size, device=device) * stride
    weights = places.reshape(-1) * _GOLDEN + 1
    table = tables.get(device)
    if table is None:
        table = tables[device] = _mix(torch.arange(1, 2**16 + 1, device=device) * _GOLDEN)
    word = torch.uint8 if local.element_size() == 1 else torch.uint16
    num_rows = max(1, _PIECE // len(weights))
    total = torch.zeros((), dtype=torch.int64, device=device)
    for first in range(0, extent[0], num_rows):
        rows = local[first : first + num_rows].contiguous()
        words = rows.view(word).to(torch.int32).reshape(len(rows), -1)
        numbers = table.index_select(0, words.reshape(-1)).view_as(words)
        starts = (torch.arange(len(rows), device=device) + (offset[0] + first)) * strides[0] * _GOLDEN
        total += (numbers.sum(1) * starts).sum() + numbers.mul_(weights).sum()
    return int(total) % 2**64


def _mix(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ (words >> 30)) * _FIRST
    words = (words ^ (words >> 27)) * _SECOND
    return words ^ (words >> 31)
