"""Objects among the records of an evaluation. Each computes its own result; they are not averaged like numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from ..ranks import collectives
from ..records import flatten_nested_dict, unflatten_nested_dict

Key: TypeAlias = "tuple[Any, ...]"


def take_out(records: Any, is_taken: Callable[[Any], bool]) -> tuple[dict[Key, Any], Any]:
    """The values of nested records for which `is_taken` is true, by key, and the records without them."""
    if not isinstance(records, Mapping):
        return {}, records
    flat = flatten_nested_dict(records)
    taken = {key: value for key, value in flat.items() if is_taken(value)}
    if not taken:
        return {}, records
    return taken, unflatten_nested_dict({key: value for key, value in flat.items() if key not in taken})


def check_same_on_ranks(keys: Iterable[Key], condition: str) -> None:
    """Raise unless every rank has the same keys. Call on every rank.

    Args:
        keys: This rank's keys, in order.
        condition: Start of the error message, which says what must be the same: "The … must be the same on every rank,
            but are".

    Raises:
        ValueError: On every rank, with the names of each rank.
    """
    names = ["/".join(map(str, key)) for key in keys]
    if not collectives.is_same_on_ranks(zlib.crc32(repr(names).encode())):
        by_rank = collectives.gather_objects(names)
        raise ValueError(f"{condition}, by rank: {by_rank}. Return each of them for every batch.")


def ignore(*args: Any, **kwargs: Any) -> None:
    """Replaces an object's method while nothing may be added to it."""
