"""Values per sample, collected over batches and ranks in the order of the data. Each sample appears once.

In: nested values of each batch. Out: the same nesting; each leaf has the samples of all batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import describe
from ..ranks import collectives
from ..records import map_nested_tensor
from .objects import Key, check_same_on_ranks, take_out

_NUM_AT_ONCE = 64
"""Batches of a rank that are sent together. Memory holds twice as many from each rank."""


class PerSample:
    """A record of `eval_forward` with one value per sample. `evaluate` collects the values over all ranks.

    `finish_evaluation` gets the values of all samples in the order of the data, each sample once, on the CPU of every
    rank. It can compute numbers from them. The values themselves are not logged, but `evaluate` returns them. If each
    rank reads its share of a stream, the order is: one batch of each rank in turn.

    Args:
        values: A tensor or numpy array whose first dimension is the batch, a list with one item per sample, or a
            mapping or tuple of these.

    Example:
        ```python
        def eval_forward(self, batch):
            scores = self.model(batch["x"])
            loss = self.loss(scores, batch["y"])
            return loss, {"scores": PerSample(scores), "labels": PerSample(batch["y"])}

        def finish_evaluation(self, metrics):
            scores, labels = metrics.pop("scores"), metrics.pop("labels")
            return {**metrics, "auc": roc_auc_score(labels, scores)}
        ```
    """

    def __init__(self, values: Any) -> None:
        self.values = values


class Collected:
    """The outputs of this rank's batches, on the CPU.

    Args:
        name: Name of the output in error messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._outputs: dict[int, Any] = {}

    def add(self, index: int, nested: Any, is_counted: bool) -> None:
        """Add the output of a batch. Call in every round, on every rank, because sharded tensors are gathered.

        Args:
            index: Number of the batch.
            nested: Nested values; each leaf has one value per sample.
            is_counted: Whether the batch counts on this rank.

        Raises:
            TypeError: A leaf is not a tensor, array or list.
            ValueError: A leaf has no samples, or the leaves have different numbers of samples.
        """
        nested = map_nested_tensor(_on_host, nested)
        lengths = dict(_lengths(nested, self._name))
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Each value of {self._name} must have as many samples as the others, but has: {lengths}.")
        if is_counted:
            self._outputs[index] = nested

    def take(self) -> dict[int, Any]:
        """The outputs that were added since the last call, by number of the batch."""
        outputs, self._outputs = self._outputs, {}
        return outputs

    def result(self) -> Any:
        """The samples of all ranks, the same on every rank. Call on every rank.

        Raises:
            ValueError: The batches can't be joined, for example because their shapes differ.
        """
        outputs = self.take()
        (last,) = collectives.start_max([max(outputs, default=-1)])()
        num_batches = last + 1
        ordered: list[Any] = []
        for start in range(0, num_batches, _NUM_AT_ONCE * collectives.world_size()):
            end = start + _NUM_AT_ONCE * collectives.world_size()
            mine = {index: outputs.pop(index) for index in sorted(outputs) if start <= index < end}
            ordered += in_order(collectives.gather_objects(mine))
        return joined(ordered, self._name)


class CollectedRecords:
    """The `PerSample`s among the records of an evaluation."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Collected] = {}

    def split(self, records: Any, index: int, is_counted: bool) -> Any:
        """The records without `PerSample`s. The `PerSample`s are collected."""
        found, others = take_out(records, lambda value: isinstance(value, PerSample))
        for key, record in found.items():
            own = self._by_key.setdefault(key, Collected(f'the record "{"/".join(map(str, key))}"'))
            own.add(index, record.values, is_counted)
        return others

    def result(self) -> dict[Key, Any]:
        """The collected values, by key. Call on every rank."""
        keys = sorted(self._by_key, key=str)
        condition = "The `PerSample` records of `eval_forward` must have the same names on every rank, but have"
        check_same_on_ranks(keys, condition)
        return {key: self._by_key[key].result() for key in keys}


def in_order(by_rank: Sequence[Mapping[int, Any]]) -> list[Any]:
    """The outputs of all ranks, in the order of the batches."""
    together = {index: nested for part in by_rank for index, nested in part.items()}
    return [together[index] for index in sorted(together)]


def joined(outputs: Sequence[Any], name: str) -> Any:
    """Join the nested outputs of all batches into one: tensors and arrays along their first dimension, lists by
    concatenation.
    """
    first = outputs[0]
    if isinstance(first, Mapping):
        return {key: joined([output[key] for output in outputs], f"{name}/{key}") for key in first}
    if isinstance(first, tuple):
        parts = [joined(list(part), f"{name}/{i}") for i, part in enumerate(zip(*outputs, strict=True))]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, list):
        return [item for output in outputs for item in output]
    shapes = {tuple(output.shape[1:]) for output in outputs}
    if len(shapes) > 1:
        raise ValueError(
            f"The batches of {name} must have one shape but for their first dimension, but have {sorted(shapes)}. Pad"
            " them to one length, or return a list with a tensor for each sample: `list(values)`."
        )
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    import numpy

    return numpy.concatenate(outputs)


def _on_host(tensor: Any) -> torch.Tensor:
    tensor = tensor.detach()
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    host: torch.Tensor = whole.clone() if whole.device.type == "cpu" else whole.cpu()
    return host


def _lengths(nested: Any, name: str) -> list[tuple[str, int]]:
    """The number of samples in each leaf, by name."""
    if isinstance(nested, Mapping):
        return [item for key, value in nested.items() for item in _lengths(value, f"{name}/{key}")]
    if isinstance(nested, tuple):
        return [item for i, value in enumerate(nested) for item in _lengths(value, f"{name}/{i}")]
    if isinstance(nested, list):
        return [(name, len(nested))]
    if not hasattr(nested, "shape"):
        raise TypeError(
            f"{name} must be a tensor, an array or a list with a value for each sample, or a mapping or tuple of such,"
            f" but is {describe(nested)}."
        )
    if not len(nested.shape):
        raise ValueError(f"{name} must have a value for each sample, but is one number for the whole batch.")
    return [(name, len(nested))]
