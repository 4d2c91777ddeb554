"""Tensors in the safetensors format.

Files are read by safetensors itself. They are written here, because its `save_file` goes through a temporary file of
mode 0600, turns a full disk into an error without its number, and leaves the checksum to a second reading.

A complex tensor is stored as a real one with a last dimension of 2: most versions of safetensors know no complex dtype.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
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
    if _code(tensor) is None:
        raise TypeError(
            f"Tensor {name} has dtype {dtype_name(tensor.dtype)}, which the safetensors format does not have."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"Tensor {name} must be dense to be saved, but its layout is {tensor.layout}.")
    if tensor.device.type == "meta":
        raise TypeError(f"Tensor {name} is on the meta device: it has no values to save.")


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> list[Buffer]:
    """The bytes of a safetensors file, without a copy of the tensors.

    Args:
        tensors: Contiguous tensors on the CPU. They have to live as long as the buffers.
        metadata: Text for the file's header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    buffers: list[Buffer] = []
    end = 0
    # Wide elements first, so that each tensor is aligned to its own.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _code(tensor), "shape": list(as_real(tensor).shape), "data_offsets": [begin, end]}
        if tensor.nbytes:
            buffers.append(_bytes_of(tensor))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *buffers]


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


def _code(tensor: torch.Tensor) -> str | None:
    dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    return CODES.get(dtype_name(dtype))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory. Not by way of numpy, which knows no bfloat16."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
