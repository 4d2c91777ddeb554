"""Writes and reads tensors in the safetensors format.

safetensors' own `save_file` goes through a temporary file of mode 0600, reports a full disk without an error number,
and would need a second pass for the checksum. Its reader follows links and maps the file: if the file is truncated
while it is read, the process dies.

A complex tensor is stored as a real one with a last dimension of 2: most versions of safetensors have no complex dtype.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from .boxes import Box, slices
from .checks import mapping, shown, sizes, text
from .dtypes import DTYPES_BY_CODE, dtype_code, dtype_name
from .files import open_regular
from .integrity import Buffer
from .limits import MAX_HEADER_BYTES, MAX_TENSORS
from .nested import RESERVED_NAME, parse_json

_PIECE_BYTES = 2**24
"""Size of one read if the values go to a device or to a part of a tensor's rows."""


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """Raise if the format cannot hold the tensor.

    Raises:
        TypeError: safetensors doesn't support its dtype or layout, or it has no data.
    """
    if dtype_code(tensor.dtype) is None:
        raise TypeError(
            f"Tensor {name} has dtype {dtype_name(tensor.dtype)}, which the safetensors format does not have."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"Tensor {name} must be dense to be saved, but its layout is {tensor.layout}.")
    if tensor.device.type == "meta":
        raise TypeError(f"Tensor {name} is on the meta device: it has no values to save.")


def header(
    described: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The header of a safetensors file.

    Args:
        described: Dtype and shape of each tensor.
        metadata: Text for the file's header.

    Returns:
        The bytes, and the names in the order in which the bytes of the tensors must follow.

    Raises:
        ValueError: There are too many tensors for one header.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide elements first, so that each tensor is aligned to its element size.
    order = sorted(described, key=lambda name: -described[name][0].itemsize)
    end = 0
    for name in order:
        dtype, shape = described[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        stored_shape = [*shape, 2] if dtype.is_complex else list(shape)
        entries[name] = {"dtype": dtype_code(dtype), "shape": stored_shape, "data_offsets": [begin, end]}
    written = json.dumps(entries, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    if len(written) > MAX_HEADER_BYTES:
        raise ValueError(
            f"The header of a file of {len(order)} tensors would have {len(written)} bytes, but can have"
            f" {MAX_HEADER_BYTES} at most. Save fewer tensors, or with shorter names."
        )
    return struct.pack("<Q", len(written)) + written, order


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> list[Buffer]:
    """The bytes of a safetensors file, without copying the tensors.

    Args:
        tensors: Contiguous tensors on the CPU. They must live as long as the buffers.
        metadata: Text for the file's header.
    """
    begin, order = header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata)
    return [begin, *(bytes_of(tensors[name]) for name in order if tensors[name].nbytes)]


@contextmanager
def open_tensors(folder: Path, path: str) -> Iterator[TensorFile]:
    """Open a file of tensors in a checkpoint.

    Raises:
        CheckpointError: It cannot be read, now or while it is in use.
    """
    try:
        with open_regular(folder, path) as file:
            yield TensorFile(file, path)
    except OSError as ex:
        raise CheckpointError(f"{folder / path} cannot be read: {ex.strerror or ex}") from ex


class TensorFile:
    """A safetensors file, read in parts.

    Attributes:
        stored: Dtype and shape of each tensor as it is stored, by name.
    """

    def __init__(self, file: BufferedReader, path: str) -> None:
        """
        Args:
            file: The file, open for reading.
            path: Name of the file in error messages.

        Raises:
            CheckpointError: Its header is not valid, or doesn't match the size of the file.
        """
        self._file, self._path = file, path
        try:
            self._begins, self.stored = _read_header(file)
        except (KeyError, TypeError, ValueError) as ex:
            raise CheckpointError(f"{path} is damaged: its header is not as safetensors has it ({ex})") from ex

    def continue_in(self, file: BufferedReader) -> None:
        """Continue reading from the same file, opened again."""
        self._file = file

    def check(self, key: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Raise unless a tensor is stored with the dtype and shape in the manifest.

        Raises:
            CheckpointError: It is missing, or has another dtype or shape.
        """
        expected = (dtype.to_real() if dtype.is_complex else dtype, (*shape, 2) if dtype.is_complex else tuple(shape))
        found = self.stored.get(key)
        if found != expected:
            has = "does not have" if found is None else f"has as {_told(*found)}"
            raise CheckpointError(f"{self._path} is damaged: it {has} {shown(key)}, which should be {_told(*expected)}")

    def empty(self, device: str) -> dict[str, torch.Tensor]:
        """Empty tensors with the stored dtypes and shapes."""
        return {key: torch.empty(shape, dtype=dtype, device=device) for key, (dtype, shape) in self.stored.items()}

    def read_all(self) -> dict[str, torch.Tensor]:
        """Read all tensors, onto the CPU.

        Raises:
            CheckpointError: The file ends too early.
        """
        tensors = self.empty("cpu")
        for key, tensor in tensors.items():
            if tensor.numel():
                self.read_into(key, 0, bytes_of(tensor))
        return tensors

    def read_into(self, key: str, offset: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes of a tensor, starting at `offset`.

        Raises:
            CheckpointError: The file ends too early.
        """
        self._file.seek(self._begins[key] + offset)
        if self._file.readinto(memory) != len(memory):
            raise CheckpointError(f"{self._path} ends in the middle of {key}")

    @torch.no_grad()
    def read_box(self, key: str, box: Box, target: torch.Tensor) -> None:
        """Fill a tensor with a part of a stored one, bit for bit.

        Args:
            key: Name of the stored tensor. It must have passed `check` with the dtype of `target`.
            box: The part.
            target: A tensor of the part's shape, on any device; it may be a view.
        """
        if not target.numel():
            return
        _, shape = self.stored[key]
        shape = shape[:-1] if target.is_complex() else shape
        begin, extent = (box[0] or (0,)), (box[1] or (1,))
        row_shape = shape[1:]
        row_bytes = math.prod(row_shape) * target.element_size()
        has_whole_rows = extent[1:] == tuple(row_shape)
        if has_whole_rows and target.device.type == "cpu" and is_plain(target):
            self.read_into(key, begin[0] * row_bytes, bytes_of(target))
            return
        target = target if target.dim() else target.unsqueeze(0)
        index = (slice(None), *slices((begin[1:], extent[1:]), (0,) * len(row_shape)))
        num_rows = extent[0] if is_expanded(target) else max(1, _PIECE_BYTES // row_bytes)
        for first in range(0, extent[0], num_rows):
            rows = torch.empty((min(num_rows, extent[0] - first), *row_shape), dtype=target.dtype)
            self.read_into(key, (begin[0] + first) * row_bytes, bytes_of(rows))
            fill(target[first : first + num_rows], rows[index])


def fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Write values from the CPU into a tensor, which may be any view.

    Raises:
        CheckpointError: Elements of an expanded tensor, which share memory, would need different values.
    """
    if is_expanded(target):
        sizes_strides = zip(target.shape, target.stride(), strict=True)
        first = tuple(slice(0, 1) if stride == 0 else slice(None) for size, stride in sizes_strides)
        if not _same_bits(values, values[first].expand_as(values)):
            raise CheckpointError(
                f"A tensor of shape {list(target.shape)} is expanded, so some of its elements are the same memory, but"
                " they were saved with different values. Make it contiguous in the model"
            )
        target, values = target[first], values[first]
    target.copy_(values)


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether elements along a dimension share memory, as after `Tensor.expand`."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the bytes in memory are the values, in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory. numpy can't be used for this, because it has no bfloat16."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _read_header(file: BufferedReader) -> tuple[dict[str, int], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The position of each tensor in the file, and its dtype and shape. The tensors must cover all bytes after the
    header.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 <= length <= min(MAX_HEADER_BYTES, num_bytes - 8):
        raise ValueError(f"of {length} bytes in a file of {num_bytes}")
    entries = mapping("header", parse_json(file.read(length)), MAX_TENSORS)
    entries.pop(RESERVED_NAME, None)
    begins: dict[str, int] = {}
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    places = []
    for key, entry in entries.items():
        dtype, shape = DTYPES_BY_CODE[text("dtype", entry["dtype"])], sizes("shape", entry["shape"])
        begin, end = sizes("data_offsets", entry["data_offsets"])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{shown(key)} has {end - begin} bytes, which are not those of {_told(dtype, shape)}")
        places.append((begin, end))
        begins[key], stored[key] = 8 + length + begin, (dtype, shape)
    last = 0
    for begin, end in sorted(places):
        if begin != last:
            raise ValueError(f"tensors overlap or leave a gap at byte {begin}")
        last = end
    if last != num_bytes - 8 - length:
        raise ValueError(f"of tensors with {last} bytes, but {num_bytes - 8 - length} follow")
    return begins, stored


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def _told(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{dtype_name(dtype)} {shown(list(shape))}"
