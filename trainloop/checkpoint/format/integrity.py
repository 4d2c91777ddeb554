"""Checksums of what is written, and whether all of it is finite."""

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
    """Whether every element of a tensor, which is on the CPU, is finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A sum is finite only if all that it is made of is. It reads the memory once and copies nothing: an eighth of what
    # `isfinite` takes. One that overflows is looked at again.
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # `isfinite` knows no fp8
    return bool(torch.isfinite(wide).all())


def sums_of_bytes(tensors: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor a sum of its bytes, eight at a time, modulo 2^64: equal tensors have equal sums, and a difference
    of one bit changes it. Reads at the speed of memory, and syncs once for each device.
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
    """CRC-32 of buffers, computed by a thread while the disk is busy with them. A bare thread: executors refuse work
    while the interpreter ends, when a save may still be in flight.
    """

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self._crc = 0
        self._thread = threading.Thread(target=self._run, args=(buffers,), name="crc32")
        self._thread.start()

    def result(self) -> int:
        """The checksum, when it is ready."""
        self._thread.join()
        return self._crc

    def _run(self, buffers: Iterable[Buffer]) -> None:
        self._crc = crc32(buffers)
