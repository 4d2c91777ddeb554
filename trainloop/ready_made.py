"""The trainer for scripts that already have their model, optimizer and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import describe
from .hook import BaseHook
from .records import Records
from .setup.subclasses import check_call
from .trainer import BaseTrainer

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class Trainer(BaseTrainer):
    """The same trainer, made from objects that a script already has. Accelerate may have prepared them or not.

    Args:
        model: The model, or several by name, as `BaseTrainer.build_model` returns them.
        optimizer: Its optimizer, or several by name, as `BaseTrainer.build_optimizer` returns them.
        data_loader: The training data, as `BaseTrainer.build_data_loader` returns it.
        forward: Called as `forward(model, batch)`, with the prepared model. Returns the same as `BaseTrainer.forward`.
        lr_scheduler: As `BaseTrainer.build_lr_scheduler` returns it. It moves once per applied update, at any number of
            processes. A prepared scheduler is unwrapped.
        hooks: Called in this order.
        batch_weight: Called like `BaseTrainer.batch_weight`.
        eval_data_loader: The evaluation data, as `BaseTrainer.build_eval_data_loader` returns it.
        eval_forward: Called like `forward`, on the evaluation data. None: `forward`.
        predict_forward: Called as `predict_forward(model, batch)`. Returns the same as `BaseTrainer.predict_forward`.
        finish_evaluation: Called like `BaseTrainer.finish_evaluation`.
        forward_methods: See `BaseTrainer.forward_methods`.
        frozen: Frozen modules that `forward` needs beside the model, prepared in place. See
            `BaseTrainer.build_frozen`.
        **kwargs: Arguments of `BaseTrainer`.

    Example:
        ```python
        Trainer(model=model, optimizer=optimizer, data_loader=loader, forward=lambda model, batch: (model(batch), {}),
                max_steps=1000).train()
        ```
    """

    def __init__(
        self,
        *,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Optimizer | Mapping[str, Optimizer],
        data_loader: Iterable[Any],
        forward: Callable[[nn.Module, Any], tuple[torch.Tensor | None, Records]],
        lr_scheduler: LRScheduler | Mapping[str, Any] | None = None,
        hooks: Sequence[BaseHook] = (),
        batch_weight: Callable[[Any], float | torch.Tensor | None] | None = None,
        eval_data_loader: Any = None,
        eval_forward: Callable[[nn.Module, Any], tuple[torch.Tensor | None, Records]] | None = None,
        predict_forward: Callable[[nn.Module, Any], Any] | None = None,
        finish_evaluation: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        forward_methods: Sequence[str] = (),
        frozen: nn.Module | Mapping[str, nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        functions: dict[str, Any] = {"forward": forward, "batch_weight": batch_weight, "eval_forward": eval_forward}
        functions |= {"predict_forward": predict_forward, "finish_evaluation": finish_evaluation}
        arguments = {"batch_weight": ["batch"], "finish_evaluation": ["metrics"]}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise TypeError(f"`{name}` must be callable, but is {describe(function)}.")
            if function is not None:
                check_call(name, function, arguments.get(name, ["model", "batch"]))
        self._given = (model, optimizer, data_loader, lr_scheduler, list(hooks), eval_data_loader, frozen)
        self._forward, self._batch_weight, self._eval_forward = forward, batch_weight, eval_forward or forward
        self._predict_forward, self._finish_evaluation = predict_forward, finish_evaluation
        self.forward_methods = forward_methods
        super().__init__(**kwargs)

    def build_model(self) -> nn.Module | Mapping[str, nn.Module]:
        return self._given[0]

    def build_optimizer(self) -> Optimizer | Mapping[str, Optimizer]:
        return self._given[1]

    def build_data_loader(self) -> Iterable[Any]:
        return self._given[2]

    def build_lr_scheduler(self) -> LRScheduler | Mapping[str, Any] | None:
        return self._given[3]

    def build_hooks(self) -> list[BaseHook]:
        return self._given[4]

    def build_eval_data_loader(self) -> Any:
        return self._given[5]

    def build_frozen(self) -> nn.Module | Mapping[str, nn.Module] | None:
        return self._given[6]

    def forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        return self._forward(self.model, batch)

    def eval_forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        return self._eval_forward(self.model, batch)

    def predict_forward(self, batch: Any) -> Any:
        if self._predict_forward is None:
            return super().predict_forward(batch)
        return self._predict_forward(self.model, batch)

    def finish_evaluation(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics if self._finish_evaluation is None else self._finish_evaluation(metrics)

    def batch_weight(self, batch: Any) -> float | torch.Tensor | None:
        return self._batch_weight(batch) if self._batch_weight is not None else None

    def _has_batch_weight(self) -> bool:
        return self._batch_weight is not None
