"""The dtypes that a checkpoint can hold, and their names."""

from __future__ import annotations

import functools

import torch

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
"""Names of dtypes in the safetensors format, by torch's names. Only those that every version of safetensors that we
allow can read.
"""

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in (*CODES, "complex32", "complex64", "complex128")
}
"""The dtypes that a manifest may name."""
DTYPES_BY_CODE: dict[str, torch.dtype] = {code: getattr(torch, name) for name, code in CODES.items()}


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype, "float32"."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def dtype_code(dtype: torch.dtype) -> str | None:
    """The format's name of a dtype, or of its real parts if it is complex. None: the format doesn't support it."""
    return CODES.get(dtype_name(dtype.to_real() if dtype.is_complex else dtype))
