"""Checks of values that were read from JSON. Each raises a ValueError that says what the value must be."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from typing import Any

from .limits import MAX_DIMS, MAX_TEXT, MAX_WHOLE


def whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if type(value) is not int or not least <= value <= MAX_WHOLE:
        raise ValueError(f"`{name}` must be a whole number from {least} to {MAX_WHOLE}, but is {shown(value)}")
    return value


def number(name: str, value: Any) -> float:
    """A number, perhaps infinite or NaN, as a float."""
    if type(value) not in (int, float):
        raise ValueError(f"`{name}` must be a number, but is {shown(value)}")
    return float(value)


def finite(name: str, value: Any) -> float:
    """A finite number as a float."""
    if not math.isfinite(number(name, value)):
        raise ValueError(f"`{name}` must be finite, but is {shown(value)}")
    return float(value)


def text(name: str, value: Any) -> str:
    """A short text that can be encoded in UTF-8."""
    if type(value) is not str or len(value) > MAX_TEXT:
        raise ValueError(f"`{name}` must be a text of at most {MAX_TEXT} characters, but is {shown(value)}")
    value.encode()  # half of a surrogate pair raises a UnicodeEncodeError, which is a ValueError
    return value


def inner_path(name: str, value: Any) -> str:
    """The path of a file inside a folder; see `is_inner_path`."""
    if not is_inner_path(text(name, value)):
        raise ValueError(f"`{name}` must be a path inside the checkpoint, but is {shown(value)}")
    return str(value)


def is_inner_path(path: str) -> bool:
    """Whether a path stays in its folder, and is in its shortest form with "/" between the parts."""
    is_of_other_system = os.sep != "/" and (os.sep in path or ":" in path)
    return "\0" not in path and not is_of_other_system and not {"", ".", ".."} & set(path.split("/"))


def mapping(name: str, value: Any, max_entries: int) -> dict[str, Any]:
    """An object with at most `max_entries`."""
    if type(value) is not dict or len(value) > max_entries:
        raise ValueError(f"`{name}` must be an object of at most {max_entries} entries, but is {shown(value)}")
    return value


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """A list of whole numbers, one for each dimension."""
    if type(value) is not list or len(value) > MAX_DIMS:
        raise ValueError(f"`{name}` must be a list of at most {MAX_DIMS} whole numbers, but is {shown(value)}")
    for item in value:
        if type(item) is not int or not 0 <= item <= MAX_WHOLE:
            raise ValueError(f"`{name}` must hold whole numbers from 0 to {MAX_WHOLE}, but is {shown(value)}")
    return tuple(value)


def only_keys(name: str, value: Mapping[str, Any], keys: frozenset[str]) -> None:
    """An object with exactly these keys."""
    if value.keys() != keys:
        raise ValueError(f"`{name}` must have the keys {', '.join(sorted(keys))}, but has {shown(sorted(value))}")


def shown(value: Any) -> str:
    """A value in an error message, cut short."""
    return reprlib.repr(value)
