"""Metrics of Hugging Face's `evaluate` among the records of an evaluation.

Such an object stores the arguments of `add_batch`, of this rank only, and computes its result from all of them at the
end. So the ranks exchange the stored examples, and every rank's object gets all of them in the order of the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..ranks import collectives
from ..records import flatten_nested_dict, unflatten_nested_dict
from .collected import in_order, joined
from .objects import Key, check_same_on_ranks, ignore, take_out

_ADDERS = ("add", "add_batch")


class EvaluateModules:
    """The `EvaluationModule`s among the records: objects with `compute` and `add_batch`, which `eval_forward` calls."""

    def __init__(self) -> None:
        self._modules: dict[Key, Any] = {}
        self._ends: dict[Key, dict[int, int]] = {}
        """By number of each batch that counts: how many examples the object had after it."""

    @contextmanager
    def muted(self, is_muted: bool) -> Iterator[None]:
        """Inside this context, nothing is added to the objects."""
        own = [(module, name, getattr(module, name)) for module in self._modules.values() for name in _ADDERS]
        for module, name, _ in own if is_muted else ():
            setattr(module, name, ignore)
        try:
            yield
        finally:
            for module, name, method in own if is_muted else ():
                setattr(module, name, method)

    def split(self, records: Any, index: int, is_counted: bool) -> Any:
        """The records without such objects. The objects are remembered."""
        found, others = take_out(records, _is_module)
        for key, module in found.items():
            if key not in self._modules:
                _check(key, module)
                self._modules[key], self._ends[key] = module, {}
            if is_counted:
                self._ends[key][index] = len(module)
        return others

    def result(self) -> dict[Key, Any]:
        """The result of each object, computed from the examples of all ranks. Call on every rank."""
        condition = "The objects of `evaluate` in the records of `eval_forward` must be the same on every rank, but are"
        check_same_on_ranks(sorted(self._modules), condition)
        flat: dict[Key, Any] = {}
        for key in sorted(self._modules):
            module, begin, batches = self._modules[key], 0, {}
            inputs = _take(module)
            for index, end in self._ends[key].items():
                batches[index] = {name: values[begin:end] for name, values in inputs.items()}
                begin = end
            together = joined(in_order(collectives.gather_objects(batches)), "/".join(map(str, key)))
            computed = module.compute(**together)
            # Avoid names that repeat themselves, such as `{"accuracy": {"accuracy": 0.9}}`.
            is_single = isinstance(computed, Mapping) and computed.keys() == {key[-1]}
            flat[key] = computed[key[-1]] if is_single else computed
        return flatten_nested_dict(unflatten_nested_dict(flat))

    def reset(self) -> None:
        """Drop the examples of an evaluation that was not finished."""
        for module in self._modules.values():
            if len(module):
                _take(module)


def _is_module(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("add_batch", "compute"))


def _check(key: Key, module: Any) -> None:
    name = "/".join(map(str, key))
    if not callable(getattr(module, "_compute", None)) or not hasattr(module, "__len__"):
        raise TypeError(
            f'The record "{name}" is a {type(module).__name__}, which keeps its examples in several objects of'
            " `evaluate`. Return each of these instead."
        )
    if getattr(module, "num_process", 1) != 1:
        raise ValueError(
            f'The record "{name}" must be an object of `evaluate` with `num_process=1`, but has {module.num_process}.'
            " Load it without `num_process`: trainloop brings the examples of the ranks together."
        )


def _take(module: Any) -> dict[str, list[Any]]:
    """Take all examples out of the object."""
    if not len(module):
        return {}
    own, taken = vars(module).get("_compute"), {}

    def take(**inputs: Any) -> dict[str, Any]:
        taken.update({name: inputs[name] for name in _names(module)})
        return {}

    module._compute = take
    try:
        module.compute()
    finally:
        if own is None:
            del module._compute
        else:
            module._compute = own
    return {name: list(values) for name, values in taken.items()}


def _names(module: Any) -> list[str]:
    features = module.features
    return [*(features[0] if isinstance(features, list) else features)]
