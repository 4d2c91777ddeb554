"""Nested records: mappings and sequences of numbers, as `forward` returns and hooks log them. Pure functions."""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch

from .errors import describe

K = TypeVar("K")
_WIDE = (torch.float32, torch.float64)
Records: TypeAlias = Mapping[str, Any]
"""Mapping of numbers and 0-dim tensors, or of such mappings and sequences."""


class ShownRecords(dict[str, Any]):
    """Records that a log line has already shown. No warning is needed if no hook writes them."""


def map_nested_tensor(fn: Callable[[torch.Tensor], Any], nested: Any) -> Any:
    """Apply `fn` to every tensor in nested containers.

    Args:
        fn: Called with each tensor.
        nested: Mappings, lists, tuples, named tuples, sets and dataclass objects keep their type. Other values that are
            not tensors are returned as they are.

    Returns:
        New containers of the same structure; `nested` is unchanged.
    """
    return map_nested(fn, nested, lambda value: isinstance(value, torch.Tensor))


def map_nested(fn: Callable[[Any], Any], nested: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """Apply `fn` to every value in nested containers for which `is_leaf` is true. Else as `map_nested_tensor`."""

    def walk(value: Any) -> Any:
        if is_leaf(value):
            return fn(value)
        if isinstance(value, Mapping):
            items = {key: walk(item) for key, item in value.items()}
            if type(value) is dict or not isinstance(value, MutableMapping):
                return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
            copied = copy.copy(value)  # a defaultdict keeps its factory, a transformers BatchEncoding its attributes
            copied.update(items)
            return copied
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(walk, value))
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(map(walk, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            twin = copy.copy(value)
            for field in dataclasses.fields(value):
                # Not `replace`: it would run `__init__` and `__post_init__` again, and refuses fields with init=False.
                object.__setattr__(twin, field.name, walk(getattr(value, field.name)))
            return twin
        return value

    return walk(nested)


def flatten_nested_dict(nested: Mapping[Any, Any]) -> dict[tuple[Any, ...], Any]:
    """Flatten nested mappings. Each key of the result is the tuple of the keys that lead to its value.

    Args:
        nested: Nested mappings; sequences count as values.

    Example:
        ```python
        assert flatten_nested_dict({"loss": {"l1": 1.0, "l2": 2.0}}) == {("loss", "l1"): 1.0, ("loss", "l2"): 2.0}
        ```
    """
    flat: dict[tuple[Any, ...], Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({(key, *rest): leaf for rest, leaf in flatten_nested_dict(value).items()})
        else:
            flat[(key,)] = value
    return flat


def flatten_objects(records: Mapping[str, Any], method: str, what: str) -> dict[tuple[str, ...], Any]:
    """Flatten nested objects that are logged. Call on every rank that has them: DTensors are gathered, a collective.

    Args:
        records: Nested mappings of objects; a list or tuple counts as a mapping from "0", "1", and so on.
        method: The trainer's method that got them, for error messages.
        what: The kind of objects, for error messages.

    Returns:
        The objects, each by the tuple of its keys.

    Raises:
        TypeError: `records` is not a mapping, or a key is not a string.
    """
    if not isinstance(records, Mapping):
        raise TypeError(f"The records of `{method}` must be a mapping of {what}, but are {describe(records)}.")
    flat: dict[tuple[str, ...], Any] = {}

    def walk(path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, list | tuple):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    place = f"`{'/'.join(path)}` has" if path else "the records have"
                    raise TypeError(f"The keys of {what} must be strings, but {place} {describe(key)}.")
                walk((*path, key), item)
        else:
            flat[path] = value.detach().full_tensor() if hasattr(value, "full_tensor") else value

    walk((), records)
    return flat


def unflatten_nested_dict(flat: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """The inverse of `flatten_nested_dict`. Empty mappings are lost, because they have no key in `flat`."""
    nested: dict[Any, Any] = {}
    for path, value in flat.items():
        *parents, last = path
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def key_average(records: Iterable[Records]) -> dict[str, Any]:
    """Average records key by key. The mean of a key is over the records that have it.

    Args:
        records: Nested records of numbers and 0-dim tensors.

    Returns:
        Nested records of means. Tensors are averaged on their device and not read.
    """
    return unflatten_nested_dict(flat_average(records))


def flat_average(records: Iterable[Records]) -> dict[tuple[Any, ...], Any]:
    """The same as `key_average`, flattened."""
    sums: dict[tuple[Any, ...], Any] = {}
    counts: dict[tuple[Any, ...], int] = {}
    for record in records:
        for key, value in flatten_nested_dict(without_sequences(record)).items():
            number = _summable(value)
            sums[key] = sums[key] + number if key in sums else number
            counts[key] = counts.get(key, 0) + 1
    return {key: total / counts[key] if counts[key] > 1 else total for key, total in sums.items()}


def _summable(value: Any) -> Any:
    """A value in a type whose sums don't overflow: bool saturates at True, uint8 wraps at 256, fp16 ends at 65504."""
    if isinstance(value, torch.Tensor):
        value = value.detach() if value.requires_grad else value
        if value.dtype in _WIDE:
            return value
        is_whole = not value.is_floating_point() and value.device.type != "mps"  # MPS has no double precision
        return value.to(torch.float64 if is_whole else torch.float32)
    return value if isinstance(value, int | float) else float(value)


def read_rows(rows: Sequence[Mapping[K, Any]]) -> list[dict[K, float]]:
    """Read every tensor in `rows`, with one device-to-host transfer per device."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, torch.Tensor)]
    tensors = [value if value.dim() == 0 else value.reshape(()) for value in tensors]  # `reshape` isn't free
    by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    host: dict[int, float] = {}
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for kind, same in by_kind.items():
        by_device.setdefault(kind[0], []).extend(same)
    for device, group in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision
        stacks = [torch.stack(by_kind[kind]).to(wide) for kind in by_kind if kind[0] == device]
        host.update(zip(map(id, group), torch.cat(stacks).tolist(), strict=True))
    numbers = iter([host[id(tensor)] for tensor in tensors])
    return [
        {key: next(numbers) if isinstance(value, torch.Tensor) else float(value) for key, value in row.items()}
        for row in rows
    ]


def check_output(output: Any, function: str) -> tuple[torch.Tensor | None, Any]:
    """Check that `forward` or `eval_forward` returned a 0-dim loss and records, and return both.

    Raises:
        TypeError: The output is not a tuple of two, or the loss is neither a tensor nor None.
        ValueError: The loss has dimensions.
    """
    if type(output) is not tuple or len(output) != 2:
        raise TypeError(
            f"`{function}` must return a tuple (loss, records), but returned {describe(output)}.{_loss_inside(output)}"
        )
    loss, records = output
    if loss is not None:
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"The loss that `{function}` returns must be a tensor, but is {describe(loss)}.{_loss_inside(loss)}"
            )
        if loss.dim() != 0:
            raise ValueError(
                f"The loss that `{function}` returns must have no dimensions, but has shape {tuple(loss.shape)}. Take"
                " its mean."
            )
    return loss, records


def _loss_inside(output: Any) -> str:
    """What to return instead of `output`, for an error message. Empty if `output` contains no loss that we know."""
    if output is None:
        return " Does it end without `return`?"
    if isinstance(output, torch.Tensor):
        return " Return `loss, {}` if there is nothing to log."
    if isinstance(output, Mapping) and "loss" in output:  # a dict, or a ModelOutput of transformers
        return ' Return `output["loss"], {}`, or a dict of numbers to log in place of `{}`.'
    if getattr(output, "loss", None) is not None:
        return " Return `output.loss, {}`, or a dict of numbers to log in place of `{}`."
    return ""


def check_records(records: Any, _path: str = "") -> None:
    """Raise if `records` are not nested numbers. The error names the key. Reads no tensor.

    Raises:
        TypeError: `records` is not a mapping, or a value is neither a number nor a tensor nor a container of them.
        ValueError: A tensor has more than one element.
    """
    if not _path and not isinstance(records, Mapping):
        raise TypeError(
            "The records that `forward` returns must be a mapping (`{}` if there are none), but are"
            f" {describe(records)}."
        )
    if isinstance(records, Mapping):
        for key, value in records.items():
            if not isinstance(key, str):
                raise TypeError(f"The keys of records must be strings, but {_path or 'records'} has {describe(key)}.")
            check_records(value, f"{_path}/{key}" if _path else key)
    elif isinstance(records, list | tuple):
        for i, value in enumerate(records):
            check_records(value, f"{_path}/{i}")
    elif isinstance(records, torch.Tensor):
        if records.numel() != 1:
            raise ValueError(
                f'The record "{_path}" must be a number or a tensor of one element, but has shape'
                f" {tuple(records.shape)}. Reduce it first, for example by its mean."
            )
    elif not is_number(records):
        raise TypeError(f'The record "{_path}" must be a number or a 0-dim tensor, but is {describe(records)}.')


def is_number(value: Any) -> bool:
    """Whether `value` is a number of Python or numpy, or a 0-dim tensor."""
    # numpy registers its scalars as numbers, except numpy.bool and 0-dim arrays.
    return isinstance(value, numbers.Real) or (getattr(value, "shape", None) == () and hasattr(value, "item"))


def without_sequences(nested: Any) -> Any:
    """Replace sequences by mappings from "0", "1", …, so that every leaf has a key."""
    if isinstance(nested, Mapping):
        return {key: without_sequences(value) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return {str(i): without_sequences(value) for i, value in enumerate(nested)}
    return nested
