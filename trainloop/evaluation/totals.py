"""Reduces the records of an evaluation over batches and ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch

from ..ranks import collectives
from ..records import flatten_nested_dict, key_average, read_rows
from .objects import Key, check_same_on_ranks, ignore, take_out

Reduce: TypeAlias = Literal["mean", "sum", "max", "min"]

REDUCTIONS = ("mean", "sum", "max", "min")


class Totals:
    """Sums, means and extremes of the records of this rank's batches. Tensors stay on the device until `result`."""

    def __init__(self, reduce: Mapping[str, Reduce]) -> None:
        self._reduce = reduce
        self._values: dict[Key, Any] = {}
        self._weights: dict[Key, Any] = {}

    def add(self, records: Mapping[str, Any], weight: Any) -> None:
        """Add the records of a batch. `weight`, a number or a 0-dim tensor, applies to records that are averaged."""
        for key, value in flatten_nested_dict(key_average([records])).items():
            value = _wide(value)
            how = self._how(key)
            if how == "mean":
                value = _weighted(value, weight)
                self._weights[key] = self._weights.get(key, 0.0) + weight
            self._values[key] = _combined(how, self._values[key], value) if key in self._values else value

    def result(self) -> dict[Key, float]:
        """The totals over all ranks. Call on every rank: one device-to-host sync, one exchange of host values."""
        values, weights = collectives.merge_over_ranks(read_rows([self._values, self._weights]), self._merged)
        return {key: _divided(value, weights[key]) if key in weights else value for key, value in values.items()}

    def _merged(self, a: list[dict[Key, float]], b: list[dict[Key, float]]) -> list[dict[Key, float]]:
        """Merge the values and weights of two groups of ranks."""
        values, weights = dict(a[0]), dict(a[1])
        for key, value in b[0].items():
            values[key] = _combined(self._how(key), values[key], value) if key in values else value
        for key, weight in b[1].items():
            weights[key] = weights.get(key, 0.0) + weight
        return [values, weights]

    def _how(self, key: Key) -> Reduce:
        return self._reduce.get("/".join(map(str, key)), "mean")


def _wide(value: Any) -> Any:
    """A value in double precision, or in single precision if the device has no double."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()).to(torch.float32 if value.device.type == "mps" else torch.float64)
    return float(value)


def _weighted(value: Any, weight: Any) -> Any:
    """`value * weight`; 0 if the weight is 0, even if the value is NaN."""
    if isinstance(weight, torch.Tensor):
        return torch.where(weight == 0, torch.zeros_like(weight), value) * weight
    return value * weight if weight else 0.0


def _combined(how: Reduce, a: Any, b: Any) -> Any:
    if how in ("mean", "sum"):
        return a + b
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (torch.maximum if how == "max" else torch.minimum)(torch.as_tensor(a), torch.as_tensor(b))
    return (max if how == "max" else min)(a, b)


def _divided(total: float, weight: float) -> float:
    return total / weight if weight else float("nan")


class Metrics:
    """Objects in the records that accumulate by themselves, such as torchmetrics'. They have `update`, which
    `eval_forward` calls, `compute`, which reduces over the ranks, and `reset`.
    """

    def __init__(self) -> None:
        self._metrics: dict[Key, Any] = {}

    @contextmanager
    def muted(self, is_muted: bool) -> Iterator[None]:
        """Inside this context, updates do nothing, and `metric(…)` computes its value on an empty copy."""
        with ExitStack() as stack:
            for metric in self._metrics.values() if is_muted else ():
                stack.enter_context(_muted(metric))
            yield

    def split(self, records: Any, is_counted: bool) -> Any:
        """The records without metric objects. The objects are remembered."""
        metrics, others = take_out(records, _is_metric)
        for key, metric in metrics.items():
            if not is_counted and key not in self._metrics:
                metric.reset()  # this rank only has a batch that doesn't count
        self._metrics |= metrics
        return others

    def result(self) -> dict[Key, float]:
        """The result of each object. Call on every rank."""
        condition = "The metric objects in the records of `eval_forward` must be the same on every rank, but are"
        check_same_on_ranks(sorted(self._metrics), condition)
        computed = {key: self._metrics[key].compute() for key in sorted(self._metrics)}
        return dict(_numbers(key, value) for key, value in _leaves(computed))

    def reset(self) -> None:
        """Reset the objects for the next evaluation."""
        for metric in self._metrics.values():
            metric.reset()


def _is_metric(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))


@contextmanager
def _muted(metric: Any) -> Iterator[None]:
    own, original = vars(metric).get("update"), type(metric)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        unmute()
        copied = copy.deepcopy(metric)  # copies everything accumulated so far, but only in a rank's last round
        mute()
        copied.reset()
        return copied(*args, **kwargs)

    def mute() -> None:
        metric.update = ignore
        if callable(metric):  # Python looks up `__call__` in the class
            metric.__class__ = type(original.__name__, (original,), {"__call__": call, "forward": call})

    def unmute() -> None:
        metric.__class__ = original
        if own is None:
            del metric.update
        else:
            metric.update = own

    mute()
    try:
        yield
    finally:
        unmute()


def _leaves(computed: Mapping[Key, Any]) -> Iterator[tuple[Key, Any]]:
    """Each number of each result. The numbers of a vector are keyed by their index."""
    for key, value in computed.items():
        if isinstance(value, Mapping):
            yield from _leaves({(*key, name): item for name, item in value.items()})
        elif isinstance(value, torch.Tensor) and value.numel() != 1:
            yield from (((*key, str(i)), item) for i, item in enumerate(value.flatten()))
        else:
            yield key, value


def _numbers(key: Key, value: Any) -> tuple[Key, float]:
    return key, float(value)
