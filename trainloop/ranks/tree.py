"""Merges values of all ranks on rank 0 along a binomial tree: a rank talks to log2 N others at most.

8 ranks: 1 -> 0, 3 -> 2, 5 -> 4, 7 -> 6; then 2 -> 0, 6 -> 4; then 4 -> 0
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_FIRST_BYTES = 1024
"""A value of up to this size, with its length, travels as one message."""


def merge_to_first(value: T, merge: Callable[[T, T], T], group: Any) -> T:
    """Merge the values of all ranks on rank 0. Call on every rank. Pickles.

    Args:
        value: This rank's value.
        merge: Merges two values. The first one comes from lower ranks.
        group: A gloo group of all ranks.

    Returns:
        On rank 0, the merged value. On the others, a part of it.
    """
    rank, world_size, distance = dist.get_rank(), dist.get_world_size(), 1
    while distance < world_size:
        if rank & distance:
            _send(pickle.dumps(value), rank - distance, group)
            break
        if rank + distance < world_size:
            value = merge(value, pickle.loads(_receive(rank + distance, group)))
        distance *= 2
    return value


def _send(data: bytes, to: int, group: Any) -> None:
    message = bytearray(len(data).to_bytes(8, "little") + data).ljust(_FIRST_BYTES, b"\0")
    for piece in (message[:_FIRST_BYTES], message[_FIRST_BYTES:]):
        if piece:
            dist.send(torch.frombuffer(piece, dtype=torch.uint8), to, group)


def _receive(source: int, group: Any) -> bytes:
    first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
    dist.recv(first, source, group)
    raw = _bytes_of(first)
    end = 8 + int.from_bytes(raw[:8], "little")
    if end > _FIRST_BYTES:
        rest = torch.empty(end - _FIRST_BYTES, dtype=torch.uint8)
        dist.recv(rest, source, group)
        raw += _bytes_of(rest)
    return raw[8:end]


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())  # not by way of numpy, which torch may not have
