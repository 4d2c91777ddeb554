"""Nested Python state as JSON with the tensors beside: what a checkpoint stores instead of a pickle.

JSON has no NaN, no infinity and no keys but strings, so these are written as an object with a single key that begins
with "$":

```
nan                  {"$float": "nan"}
{3: 0.1}             {"$items": [[3, 0.1]]}       also where a string key begins with "$"
a tensor             {"$tensor": "rng/torch"}     its name in the file beside
```
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from ...errors import describe

Json: TypeAlias = Any

_AS_THEY_ARE = {str, int, bool, type(None)}


def encode(nested: Any) -> tuple[Json, dict[str, torch.Tensor]]:
    """Turn nested state into JSON values and tensors.

    Args:
        nested: Mappings with keys that are strings, numbers, bools or None; lists; tuples, which become lists; numbers,
            strings, bools, None and plain tensors.

    Returns:
        The JSON values, which `json.dumps(..., allow_nan=False)` takes, and the tensors (the given ones) by name.

    Raises:
        TypeError: Something else is in there; the error says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(nested, (), tensors), tensors


def decode(value: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `encode`; tuples come back as lists, other mappings than `dict` as `dict`."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, payload), *_ = value.items()
        if tag == "$float":
            return float(payload)
        if tag == "$items":
            return {decode(key, tensors): decode(item, tensors) for key, item in payload}
        if tag == "$tensor":
            return tensors[payload]
        if tag == "$complex":
            return torch.view_as_complex(tensors[payload])
    return {key: decode(item, tensors) for key, item in value.items()}


def _encode(value: Any, path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> Json:
    if type(value) in _AS_THEY_ARE:  # nearly all of it, and what is asked below goes through abstract classes
        return value
    if isinstance(value, torch.Tensor):
        if value.is_complex():  # see `tensorfile`
            return {"$complex": _put(torch.view_as_real(value.detach().resolve_conj()), path, tensors)}
        return {"$tensor": _put(value, path, tensors)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
        items = [
            [_encode_scalar(key, path, "key"), _encode(item, (*path, key), tensors)] for key, item in value.items()
        ]
        return {"$items": items}
    if isinstance(value, list | tuple):
        return [_encode(item, (*path, i), tensors) for i, item in enumerate(value)]
    return _encode_scalar(value, path, "value")


def _encode_scalar(value: Any, path: tuple[Any, ...], what: str) -> Json:
    # Subclasses (an IntEnum, numpy's float64) become what they are besides: JSON has no place for their type.
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    where = "/".join(map(str, path)) or "its root"
    raise TypeError(
        f"State to be saved may hold mappings, lists, tuples, numbers, strings, bools, None and tensors, but at {where}"
        f" there is a {what} {describe(value)}. Save what it was made from."
    )


def _put(tensor: torch.Tensor, path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> str:
    if hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"The tensor at {'/'.join(map(str, path))} is sharded over the ranks (DTensor). Save it in a group of"
            " `weights` or `shards`: nested state belongs to one rank or is the same on all."
        )
    name = base = "/".join(map(str, path)) or "tensor"
    suffix = 1
    while name in tensors:  # {"a/b": t} and {"a": {"b": t}}
        suffix += 1
        name = f"{base}~{suffix}"
    tensors[name] = tensor
    return name
