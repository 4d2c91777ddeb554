"""Predictions for each sample of a data set, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import check_int, describe
from ..ranks import collectives
from . import alone, rounds, untouched
from .collected import Collected, in_order

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_NAME = "the output of `predict_forward`"


def predict(trainer: BaseTrainer, data: Any, on_batch: Callable[[Any], None] | None, limit_batches: int | None) -> Any:
    """Run `predict_forward` over a loader, or over each loader of a mapping. Call on every rank, between steps."""
    check_int("limit_batches", limit_batches, 1, optional=True)
    if on_batch is not None and not callable(on_batch):
        raise TypeError(f"`on_batch` must be callable, but is {describe(on_batch)}.")
    if on_batch is not None and isinstance(data, Mapping):
        raise ValueError(
            f"`on_batch` takes the outputs of one data set, but the data is a mapping of {', '.join(map(str, data))}."
            " Call `predict` for each of them."
        )
    with trainer.peers.doing("a prediction"), untouched(trainer), torch.no_grad():
        if isinstance(data, Mapping):
            return {name: _predict_one(trainer, loader, None, limit_batches) for name, loader in data.items()}
        return _predict_one(trainer, data, on_batch, limit_batches)


def _predict_one(
    trainer: BaseTrainer, loader: Any, on_batch: Callable[[Any], None] | None, limit_batches: int | None
) -> Any:
    collected = Collected(_NAME)
    for one in rounds(trainer, loader, "prediction", limit_batches, keeps_order=True):
        with alone(trainer, one):
            output = trainer.predict_forward(one.batch)
        collected.add(one.index, output, one.is_counted)
        if on_batch is not None:
            by_rank = collectives.gather_on_first(collected.take())
            for batch_output in in_order(by_rank or []):
                on_batch(batch_output)
    return collected.result() if on_batch is None else None
