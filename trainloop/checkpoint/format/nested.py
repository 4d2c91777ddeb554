"""Stores nested Python state as JSON, with its tensors in a separate file. Used in place of a pickle.

Values keep their types. JSON has only lists, objects with string keys and finite numbers. Everything else is written as
an object with a single key that begins with "$":

```
nan                    {"$float": "nan"}
{3: 0.1}               {"$items": [[3, 0.1]]}       also if a string key begins with "$"
(1, 2)                 {"$tuple": [1, 2]}           likewise "$set" and "$frozenset"
deque([1], maxlen=5)   {"$deque": [[1], 5]}
Counter({3: 2})        {"$Counter": [[3, 2]]}       likewise "$OrderedDict"
defaultdict(list)      {"$defaultdict": ["list", []]}
numpy.float32(0.5)     {"$numpy": ["float32", 0.5]}
a tensor               {"$tensor": "rng/torch"}     its name in the file of tensors
```
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from ...errors import describe
from .limits import MAX_JSON_DEPTH

Json: TypeAlias = Any

_AS_THEY_ARE = {str, int, bool, type(None)}
_SEQUENCES = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
_MAPPINGS = {"$Counter": Counter, "$OrderedDict": OrderedDict}
_FACTORIES = {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
"""Allowed factories of a `defaultdict`."""
_TAGS: dict[type, str] = {kind: tag for tag, kind in [*_SEQUENCES.items(), *_MAPPINGS.items()]}
_CONTAINERS = {dict, list, deque, defaultdict, *_TAGS}
_NUMPY = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
_NUMPY |= {"float16", "float32", "float64", "str"}
"""numpy's scalars that JSON can represent exactly, by the name of their type."""
RESERVED_NAME = "__metadata__"
"""No tensor in a safetensors file can have this name."""


def encode(nested: Any) -> tuple[Json, dict[str, torch.Tensor]]:
    """Convert nested state into JSON values and tensors.

    Args:
        nested: Dicts, `Counter`s and similar mappings, whose keys are strings, numbers, bools or None. Lists, tuples,
            sets, deques. Numbers, numpy's scalars, strings, bools, None and plain tensors.

    Returns:
        The JSON values, which `json.dumps(..., allow_nan=False)` accepts, and the tensors (not copies) by name.

    Raises:
        TypeError: The state contains another type, or a subclass of one of these. The message says where.
        ValueError: It is nested too deep.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(nested, (), tensors), tensors


def decode(value: Json, tensors: Mapping[str, torch.Tensor], depth: int = 0) -> Any:
    """The inverse of `encode`.

    Args:
        value: JSON values.
        tensors: The tensors, by the names that `value` contains.
        depth: Number of levels above `value`.

    Raises:
        KeyError: A tensor is missing in `tensors`.
        ArithmeticError, IndexError, TypeError, ValueError: `encode` can't have written it, or it is nested too deep.
    """
    if not isinstance(value, list | dict):
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((tag, payload),) = value.items()
        if tag.startswith("$"):
            return _decode_tagged(tag, payload, tensors, depth)
    _check_depth(depth)
    if isinstance(value, list):
        return [decode(item, tensors, depth + 1) for item in value]
    return {key: decode(item, tensors, depth + 1) for key, item in value.items()}


def parse_json(text: str | bytes) -> Json:
    """Parse standard JSON.

    Raises:
        ValueError: It is not JSON, not UTF-8, has NaN or infinity as a number, or is nested too deep to be parsed.
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, parse_constant=_refuse)
    except RecursionError as ex:
        raise ValueError("it is nested too deep") from ex


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _check_depth(depth: int) -> None:
    if depth >= MAX_JSON_DEPTH:
        raise ValueError(f"State must have at most {MAX_JSON_DEPTH} levels of mappings and lists, but has more")


def _as_complex(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() or not tensor.dim() or tensor.shape[-1] != 2:
        raise ValueError(f"a tensor of {tensor.dtype} and shape {list(tensor.shape)} is not that of complex numbers")
    return torch.view_as_complex(tensor)


def _decode_tagged(tag: str, payload: Json, tensors: Mapping[str, torch.Tensor], depth: int) -> Any:
    if tag == "$float":
        return float(payload)
    if tag == "$tensor":
        return tensors[payload]
    if tag == "$complex":
        return _as_complex(tensors[payload])
    if tag == "$numpy" and payload[0] in _NUMPY:
        import numpy

        if isinstance(payload[1], list):
            raise ValueError("a scalar of numpy cannot be a list")
        return numpy.dtype(payload[0]).type(decode(payload[1], tensors, depth))
    _check_depth(depth)
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](_decode_all(payload, tensors, depth))
    if tag == "$items":
        return _decode_items(payload, tensors, depth)
    if tag in _MAPPINGS:
        return _MAPPINGS[tag](_decode_items(payload, tensors, depth))
    if tag == "$deque":
        items, length = payload
        return deque(_decode_all(items, tensors, depth), length)
    if tag == "$defaultdict":
        factory, items = payload
        return defaultdict(_FACTORIES[factory], _decode_items(items, tensors, depth))
    raise ValueError(f"nothing is known of the type {tag!r}")


def _decode_all(values: Json, tensors: Mapping[str, torch.Tensor], depth: int) -> list[Any]:
    return [decode(item, tensors, depth + 1) for item in values]


def _decode_items(pairs: Json, tensors: Mapping[str, torch.Tensor], depth: int) -> dict[Any, Any]:
    return {decode(key, tensors, depth + 1): decode(item, tensors, depth + 1) for key, item in pairs}


def _encode(value: Any, path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> Json:
    kind = type(value)
    if kind in _AS_THEY_ARE:  # the most frequent case
        return value
    if isinstance(value, torch.Tensor):
        if value.is_complex():  # see `tensorfile`
            return {"$complex": _put(torch.view_as_real(value.detach().resolve_conj()), path, tensors)}
        return {"$tensor": _put(value, path, tensors)}
    if kind in _CONTAINERS:
        _check_depth(len(path))
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
        return {"$items": _encode_items(value, path, tensors)}
    if kind is list:
        return _encode_all(value, path, tensors)
    if kind is deque:
        return {"$deque": [_encode_all(value, path, tensors), value.maxlen]}
    if kind is defaultdict and value.default_factory in _FACTORIES.values():
        return {"$defaultdict": [value.default_factory.__name__, _encode_items(value, path, tensors)]}
    if kind in _TAGS:
        of = _encode_items if isinstance(value, Mapping) else _encode_all
        return {_TAGS[kind]: of(value, path, tensors)}
    return _encode_scalar(value, path, "value")


def _encode_all(values: Iterable[Any], path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> list[Json]:
    return [_encode(item, (*path, i), tensors) for i, item in enumerate(values)]


def _encode_items(value: Mapping[Any, Any], path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> list[Json]:
    return [[_encode_scalar(key, path, "key"), _encode(item, (*path, key), tensors)] for key, item in value.items()]


def _encode_scalar(value: Any, path: tuple[Any, ...], what: str) -> Json:
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind.__module__ == "numpy" and (name := kind.__name__.rstrip("_")) in _NUMPY:
        return {"$numpy": [name, _encode_scalar(value.item(), path, what)]}
    where = "/".join(map(str, path)) or "its root"
    raise TypeError(
        "State to be saved may hold dicts, Counters, lists, tuples, sets, deques, numbers, numpy scalars, strings,"
        f" bools, None and tensors, but at {where} there is a {what} {describe(value)}. Save the plain values that it"
        " can be made from."
    )


def _put(tensor: torch.Tensor, path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> str:
    if hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"The tensor at {'/'.join(map(str, path))} is sharded over the ranks (DTensor). Save it in a group of"
            " `weights` or `shards`: nested state belongs to one rank or is the same on all."
        )
    name = base = "/".join(map(str, path)) or "tensor"
    suffix = 1
    while name in tensors or name == RESERVED_NAME:  # {"a/b": t} and {"a": {"b": t}}
        suffix += 1
        name = f"{base}~{suffix}"
    tensors[name] = tensor
    return name
