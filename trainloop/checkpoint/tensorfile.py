"""Tensors in the safetensors format.

Files are read by safetensors itself. They are written here, because its `save_file` goes through a temporary file of
mode 0600, turns a full disk into an error without its number, and leaves the checksum to a second reading.
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

_CODES = {
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
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
"""The format's name of each dtype that it knows, by torch's."""


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's own name, "float32"."""
    return str(dtype).removeprefix("torch.")


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """Raise if the format cannot hold the tensor.

    Raises:
        TypeError: Its dtype or layout is not one that safetensors knows, or it holds no data.
    """
    if dtype_name(tensor.dtype) not in _CODES:
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
        header[name] = {
            "dtype": _CODES[dtype_name(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
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


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory. Not by way of numpy, which knows no bfloat16."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
