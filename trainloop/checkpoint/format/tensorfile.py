"""Tensors in the safetensors format.

Whole files are read by safetensors itself. They are written here, because its `save_file` goes through a temporary file
of mode 0600, turns a full disk into an error without its number, and leaves the checksum to a second reading.

A complex tensor is stored as a real one with a last dimension of 2: most versions of safetensors know no complex dtype.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from .integrity import Buffer

CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""The format's name of a dtype, by torch's. Only those that every version of safetensors reads which we allow."""


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Torch's own name, "float32"."""
    return str(dtype).removeprefix("torch.")


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """The form in which a tensor is stored, sharing its memory: what is real as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """Raise if the format cannot hold the tensor.

    Raises:
        TypeError: Its dtype or layout is not one that safetensors knows, or it holds no data.
    """
    if _code(tensor.dtype) is None:
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
    """The beginning of a safetensors file.

    Args:
        described: Dtype and shape of each tensor.
        metadata: Text for the file's header.

    Returns:
        The bytes, and the names in the order in which the bytes of the tensors are to follow.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide elements first, so that each tensor is aligned to its own.
    order = sorted(described, key=lambda name: -described[name][0].itemsize)
    end = 0
    for name in order:
        dtype, shape = described[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        stored_shape = [*shape, 2] if dtype.is_complex else list(shape)
        entries[name] = {"dtype": _code(dtype), "shape": stored_shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> list[Buffer]:
    """The bytes of a safetensors file, without a copy of the tensors.

    Args:
        tensors: Contiguous tensors on the CPU. They have to live as long as the buffers.
        metadata: Text for the file's header.
    """
    begin, order = header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata)
    return [begin, *(bytes_of(tensors[name]) for name in order if tensors[name].nbytes)]


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU.

    Raises:
        CheckpointError: The file cannot be read.
    """
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as ex:
        raise CheckpointError(f"{path} cannot be read: {ex}") from ex


class TensorFile:
    """A safetensors file to be read in parts. safetensors itself maps the file, and what was looked at once counts as
    memory of the process as long as it is open.
    """

    def __init__(self, file: BufferedReader) -> None:
        """
        Args:
            file: The file, open for reading.
        """
        self._file = file
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        self._begins = {key: 8 + length + entry["data_offsets"][0] for key, entry in entries.items()}

    def read_into(self, key: str, offset: int, memory: memoryview) -> None:
        """Fill memory with the bytes of a tensor from `offset` on.

        Raises:
            CheckpointError: The file ends before.
        """
        self._file.seek(self._begins[key] + offset)
        if self._file.readinto(memory) != len(memory):
            raise CheckpointError(f"{self._file.name} ends in the middle of {key}")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory. Not by way of numpy, which knows no bfloat16."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


@functools.cache
def _code(dtype: torch.dtype) -> str | None:
    return CODES.get(dtype_name(dtype.to_real() if dtype.is_complex else dtype))
