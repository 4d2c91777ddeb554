"""Checksums, and whether the files of a checkpoint are what was written."""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from .layout import FileRecord

Buffer: TypeAlias = "bytes | memoryview"
Verify: TypeAlias = Literal["full", "size", "off"]

VERIFY_LEVELS = ("full", "size", "off")
_BLOCK = 2**20  # bytes read at once: they are still in the cache when their checksum is taken
_NUM_THREADS = 4


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


def crc32_of_file(path: Path) -> int:
    """CRC-32 of a file's bytes, read block by block."""
    crc = 0
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while num_read := file.readinto(block):
            crc = zlib.crc32(block[:num_read], crc)
    return crc


def find_problems(folder: Path, files: Mapping[str, FileRecord], verify: Verify = "full") -> list[str]:
    """What is wrong with the files of a checkpoint, a sentence each that begins with the file's path.

    Args:
        folder: The checkpoint.
        files: The files to look at, by path inside `folder`.
        verify: "full" reads every byte; "size" only asks for the sizes; "off" looks at nothing.
    """
    if verify == "off":
        return []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:  # reading and CRC-32 run beside one another: neither holds the GIL
        found = pool.map(lambda path: _problem(folder, path, files[path], verify), files)
        return [problem for problem in found if problem]


def _problem(folder: Path, path: str, record: FileRecord, verify: Verify) -> str:
    try:
        num_bytes = (folder / path).stat().st_size
        if num_bytes != record.num_bytes:
            return f"{path} has {num_bytes} bytes instead of {record.num_bytes}"
        if verify == "full" and crc32_of_file(folder / path) != record.crc32:
            return f"{path} is damaged: its bytes are not those that were written (CRC-32 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as ex:
        return f"{path} cannot be read ({ex.strerror or ex})"
    return ""


def is_whole(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether every file is there in its full size."""
    return not find_problems(folder, files, "size")
