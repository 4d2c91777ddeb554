"""Training mode and eval mode of the model's parts, and of optimizers that have these modes (schedule-free ones).

A schedule-free optimizer trains one set of weights, and another set is evaluated: `optimizer.eval()` puts the averaged
weights into the model, and `optimizer.train()` puts the trained ones back, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.sharding import local_tensor
from ..ranks.collectives import reshard
from .optimizers import optimizers_of

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class Modes:
    """The modes that `build_model` has set, and those of the optimizer.

    In a model that is in training mode, a part in eval mode stays in eval mode, for example a frozen backbone whose
    running statistics must not change. If the whole model is in eval mode (`from_pretrained`), all of it is trained.

    Args:
        trainer: The trainer. It must be built.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._prepared, self._model = trainer.model, trainer.unwrapped_model
        parts: list[Any] = list(optimizers_of(trainer._raw_optimizer).values())
        self._with_modes = [o for o in parts if all(callable(getattr(o, name, None)) for name in ("train", "eval"))]
        modules = self._model.named_modules() if self._model.training else ()
        self._in_eval_mode = {name: part for name, part in modules if not part.training}
        self._is_training = self._is_replaced = False

    @property
    def names_in_eval_mode(self) -> list[str]:
        """The outermost parts that `build_model` has put into eval mode."""
        return [name for name in self._in_eval_mode if name.rpartition(".")[0] not in self._in_eval_mode]

    def begin(self) -> None:
        """Switch to training mode. A part that a hook has put into eval mode stays in eval mode."""
        if not (self._prepared.training and self._model.training):
            self._prepared.train()
            for part in self._in_eval_mode.values():
                part.training = False
        for optimizer in self._with_modes:
            optimizer.train()
        self._is_training = True

    def end(self) -> None:
        """End the training: leave the averaged weights of a schedule-free optimizer in the model."""
        for optimizer in self._with_modes:
            optimizer.eval()
        self._is_training = False

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside this context the model has other weights than the optimizer's, and `averaged` must not touch them."""
        before, self._is_replaced = self._is_replaced, True
        try:
            yield
        finally:
            self._is_replaced = before

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """Inside this context the model has the averaged weights of a schedule-free optimizer. At its end the trained
        weights are back, bit for bit. Costs a copy of the weights if there is such an optimizer.

        Yields:
            Whether it has put averaged weights into the model.
        """
        if not (self._with_modes and self._is_training) or self._is_replaced:
            yield False
            return
        groups = [group for optimizer in self._with_modes for group in optimizer.param_groups]
        weights = [local_tensor(p.detach()) for group in groups for p in group["params"]]
        reshard(self._prepared)  # otherwise FSDP2 would go on using gathered weights
        backup = torch._foreach_clone(weights)
        for optimizer in self._with_modes:
            optimizer.eval()
        try:
            yield True
        finally:
            reshard(self._prepared)
            for optimizer in self._with_modes:
                optimizer.train()
            torch._foreach_copy_(weights, backup)  # `train` restores them only up to rounding
