"""Finds the entries in which two states differ, bit by bit."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


def flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Nested state as one dict by path, "model/0.weight". Of sharded tensors: this rank's part. On the CPU."""
    if isinstance(nested, Mapping):
        items: Any = nested.items()
    elif isinstance(nested, list | tuple):
        items = enumerate(nested)
    else:
        if isinstance(nested, torch.Tensor):
            nested = nested.detach()
            nested = (nested.to_local() if hasattr(nested, "to_local") else nested).cpu().clone()
        return {prefix: nested}
    entries: dict[str, Any] = {}
    for key, value in items:
        entries |= flat(value, f"{prefix}/{key}" if prefix else str(key))
    return entries


def differences(expected: Any, actual: Any, ignore: Sequence[str] = ()) -> Iterator[str]:
    """One sentence for each entry that is not bit-for-bit equal. A NaN equals itself, and 0.0 differs from -0.0.

    Args:
        expected: Nested state.
        actual: State that should be the same.
        ignore: Patterns of paths that may differ, with shell wildcards.
    """
    wanted, got = flat(expected), flat(actual)
    for path in [*wanted, *(path for path in got if path not in wanted)]:
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in ignore):
            continue
        if path not in got:
            yield f"{path} is missing; it should be {_shown(wanted[path])}"
        elif path not in wanted:
            yield f"{path} is {_shown(got[path])}, but should not be there"
        elif (difference := _difference(wanted[path], got[path])) is not None:
            yield f"{path}{difference}"


def _difference(wanted: Any, got: Any) -> str | None:
    """The rest of a sentence that begins with the path. None: no difference."""
    if not (isinstance(wanted, torch.Tensor) and isinstance(got, torch.Tensor)):
        same = type(wanted) is type(got) and repr(wanted) == repr(got)
        return None if same else f" is {_shown(got)} instead of {_shown(wanted)}"
    if (wanted.dtype, wanted.shape) != (got.dtype, got.shape):
        return f" is {_shown(got)} instead of {_shown(wanted)}"
    if wanted.numel() == 0:
        return None
    rows = [tensor.contiguous().reshape(-1).view(torch.uint8).reshape(wanted.numel(), -1) for tensor in (wanted, got)]
    differ = (rows[0] != rows[1]).any(1).nonzero().flatten()
    if len(differ) == 0:
        return None
    index = [int(i) for i in torch.unravel_index(differ[0], wanted.shape)]
    values = [tensor.reshape(-1)[differ[0]].item() for tensor in (got, wanted)]
    count = f" ({len(differ)} of {wanted.numel()} elements differ)" if wanted.numel() > 1 else ""
    return f"{index if index else ''} is {values[0]!r} instead of {values[1]!r}{count}"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > 5:
        return f"{value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
