"""Training mode and eval mode, of the model's parts and of optimizers that have them (schedule-free ones).

A schedule-free optimizer trains other weights than the ones to evaluate: `optimizer.eval()` puts the averaged weights
into the model, and `optimizer.train()` puts the others back, up to rounding.
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
    """The modes that `build_model` has chosen, and those of the optimizer.

    A part in eval mode below a model in training mode stays so, as a frozen backbone whose running statistics must not
    move. A model that comes whole in eval mode (`from_pretrained`) trains whole.

    Args:
        trainer: The trainer; it is built.
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
        """The parts that `build_model` has put into eval mode, without the parts of these."""
        return [name for name in self._in_eval_mode if name.rpartition(".")[0] not in self._in_eval_mode]

    def begin(self) -> None:
        """Begin to train. A part that a hook has put into eval mode stays so."""
        if not (self._prepared.training and self._model.training):
            self._prepared.train()
            for part in self._in_eval_mode.values():
                part.training = False
        for optimizer in self._with_modes:
            optimizer.train()
        self._is_training = True

    def end(self) -> None:
        """The run is over: the model is left with the weights that a schedule-free optimizer has averaged."""
        for optimizer in self._with_modes:
            optimizer.eval()
        self._is_training = False

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Within it the model's weights are not those of the optimizer, which must not turn them into others."""
        before, self._is_replaced = self._is_replaced, True
        try:
            yield
        finally:
            self._is_replaced = before

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """Within it the model has the weights that a schedule-free optimizer has averaged; at the end its own are back,
        bit for bit. Gives whether it has put them there. Costs a copy of the weights, with such an optimizer only.
        """
        if not (self._with_modes and self._is_training) or self._is_replaced:
            yield False
            return
        groups = [group for optimizer in self._with_modes for group in optimizer.param_groups]
        weights = [local_tensor(p.detach()) for group in groups for p in group["params"]]
        reshard(self._prepared)  # what FSDP2 still has gathered would go on being used
        backup = torch._foreach_clone(weights)
        for optimizer in self._with_modes:
            optimizer.eval()
        try:
            yield True
        finally:
            reshard(self._prepared)
            for optimizer in self._with_modes:
                optimizer.train()
            torch._foreach_copy_(weights, backup)  # `train` brings them back up to rounding
