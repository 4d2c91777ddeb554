"""Checksums of written data, and a check that all of it is finite."""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch

Buffer: TypeAlias = "bytes | memoryview"


def crc32(buffers: Iterable[Buffer]) -> int:
    """CRC-32 of the buffers, one after the other."""
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element of a CPU tensor is finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A sum is finite only if all its summands are. Summing reads the memory once and copies nothing, so it takes an
    # eighth of the time of `isfinite`. The sum may also overflow, so a non-finite sum is checked again.
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # `isfinite` doesn't support fp8
    return bool(torch.isfinite(wide).all())


def sums_of_bytes(tensors: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor, the sum of its 8-byte words, modulo 2^64. Equal tensors have equal sums, and flipping one bit
    changes the sum. Runs at the speed of memory, and syncs once per device.
    """
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_device[tensor.device].append(index)
    sums = [0] * len(tensors)
    for indices in by_device.values():
        values = torch.stack([_sum_of_bytes(tensors[index]) for index in indices]).tolist()
        for index, value in zip(indices, values, strict=True):
            sums[index] = value
    return sums


def _sum_of_bytes(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    num_words = raw.numel() // 8
    words = raw[: num_words * 8]
    if words.storage_offset() % 8:
        words = words.clone()
    total = words.view(torch.int64).sum()
    for i, byte in enumerate(raw[num_words * 8 :].to(torch.int64)):
        total = total + (byte << 8 * i)
    return total


class BackgroundCrc32:
    """CRC-32 of buffers, computed by a thread while the disk is busy with them. It is a plain thread, because executors
    refuse work when the interpreter ends, and a save may still be in flight then.
    """

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self._crc = 0
        self._thread = threading.Thread(target=self._run, args=(buffers,), name="crc32")
        self._thread.start()

    def result(self) -> int:
        """Wait for the checksum and return it."""
        self._thread.join()
        return self._crc

    def _run(self, buffers: Iterable[Buffer]) -> None:
        self._crc = crc32(buffers)
