"""Checksums of orders and samples, the same in every process. With them the ranks check that they read the same."""

from __future__ import annotations

import ctypes
import dataclasses
import zlib
from array import array
from collections.abc import Mapping
from typing import Any

import torch

_NUM_SAMPLES = 64  # first samples of a list
_NUM_ELEMENTS = 1024  # first elements of an array in a sample


def checksum(value: Any, seed: int = 0) -> int:
    """CRC of nested containers of numbers, texts, tensors and arrays. Of other objects, only the type is included."""
    if isinstance(value, torch.Tensor):
        return _of_tensor(value, seed)
    if isinstance(value, range | int | float | complex | str | bytes | None):
        return zlib.crc32(repr(value).encode(), seed)
    if isinstance(value, Mapping):
        return checksum([item for pair in value.items() for item in pair], seed)
    if isinstance(value, list | tuple):
        try:
            return zlib.crc32(array("q", value), seed)  # fast path for a list of indices: 10 ns each
        except (TypeError, OverflowError, ValueError):
            for item in value:
                seed = checksum(item, seed)
            return zlib.crc32(repr(len(value)).encode(), seed)
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):
        return zlib.crc32(value.tobytes(), zlib.crc32(str(value.dtype).encode(), seed))
    return zlib.crc32(type(value).__name__.encode(), seed)


def sample_checksum(samples: list[Any]) -> int:
    """`checksum` of the first samples of a list, and of the first elements of each array in them."""
    return checksum(_beginning(samples[:_NUM_SAMPLES]))


def _beginning(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _beginning(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return _beginning(vars(value)) if hasattr(value, "__dict__") else type(value).__name__
    if isinstance(value, list | tuple):
        return [_beginning(item) for item in value]
    if isinstance(value, torch.Tensor):
        return [list(value.shape), value.detach().reshape(-1)[:_NUM_ELEMENTS]]
    if hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "reshape"):
        return [list(value.shape), value.reshape(-1)[:_NUM_ELEMENTS]]
    return value


def _of_tensor(tensor: torch.Tensor, seed: int) -> int:
    seed = zlib.crc32(str(tensor.dtype).encode(), seed)
    flat = tensor.detach().cpu().contiguous()
    num_bytes = flat.numel() * flat.element_size()
    if not num_bytes:
        return seed
    memory = (ctypes.c_char * num_bytes).from_address(flat.data_ptr())  # no copy, and torch may have no numpy
    return zlib.crc32(memory, seed)
