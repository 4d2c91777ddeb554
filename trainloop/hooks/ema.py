"""An exponential moving average of the weights. Each rank averages its own shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.content import is_dtensor
from ..checkpoint.sharding import local_tensor
from ..errors import check_int, check_interval, describe
from ..hook import AveragingHook
from ..ranks.collectives import reshard
from ..state.live import like_param
from ..state.model_copy import CopyError, ModelCopy, loose_tensors
from ..state.modules import made_entries
from ..step.non_finite import clean_name

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_WARMUPS: dict[str, Callable[[int], float]] = {
    "ratio": lambda t: (1 + t) / (10 + t),
    "power": lambda t: 1 - (1 + t) ** (-2 / 3),
}
_COARSE = (torch.float16, torch.bfloat16)
"""The steps of these formats are larger than most updates of an average, so the average is kept in fp32."""


class EmaHook(AveragingHook):
    """Averages the weights over the steps: `average = decay * average + (1 - decay) * weights` after each update.

    Each rank averages its own shards, without communication, host sync, or a copy of the module. Parameters that were
    never trained are not averaged, and buffers are those of the model. As in torch's `AveragedModel`, the first update
    copies the weights. A discarded window is not an update. For fp16 and bf16 parameters the average is kept in fp32.

    In a checkpoint the average is in the folder `name`, in the same format as `model/`. It can be resumed at any number
    of processes, and `python -m trainloop checkpoints export --group ema` exports it as a model.

    Args:
        decay: Weight of the old average at an update, in [0, 1].
        warmup: Limits `decay` at update t (the first one, which copies, is t = 0). "ratio": (1 + t) / (10 + t), the
            default of diffusers' `EMAModel`. "power": 1 - (1 + t)^(-2/3), its `use_ema_warmup`. Or a function of t.
            None: no warm-up.
        update_interval: Optimizer steps between two updates, or "epoch".
        start_step: Until this step the average is a copy of the weights.
        module: Name of the part of the model whose weights are averaged, for example "generator". None: all of it.
        device: Device of the average. "cpu" costs a transfer per update. None: the device of the weights.
        name: Name of the average in `state_dict` and checkpoints. Several hooks need different names.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        ```python
        ema = EmaHook(0.999, warmup="ratio")
        hooks = [ema, EvaluationHook(500, ema=ema, prefix="val_ema")]

        with ema.swapped(trainer):  # on every rank
            samples = sample(trainer.model)
        ```
    """

    def __init__(
        self,
        decay: float,
        *,
        warmup: str | Callable[[int], float] | None = None,
        update_interval: int | str = 1,
        start_step: int = 0,
        device: torch.device | str | None = None,
        name: str = "ema",
        module: str | None = None,
    ) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise TypeError(f"`decay` must be a number, but is {describe(decay)}.")
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` must be in [0, 1], but is {decay}.")
        if not (warmup is None or callable(warmup) or warmup in _WARMUPS):
            raise ValueError(f"`warmup` must be one of {list(_WARMUPS)}, a function or None, but is {warmup!r}.")
        check_interval("update_interval", update_interval)
        check_int("start_step", start_step, 0)
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"`name` must be an identifier, since it names a folder, but is {name!r}.")
        self.decay = decay
        self.update_interval = update_interval
        self.start_step = start_step
        self.name = name
        self.module = module
        self.num_updates = 0
        """Number of updates of the average so far, including the initial copy."""
        self._warmup = _WARMUPS[warmup] if isinstance(warmup, str) else warmup
        self._device = torch.device(device) if device is not None else None
        self._model: nn.Module | None = None
        self._copy: ModelCopy | None = None
        self._is_swapped = False

    def _bind(self, trainer: BaseTrainer) -> None:
        """Start the average from the current weights of the model."""
        if self._model is trainer.model:
            return
        self._model, self._copy, self.num_updates = trainer.model, None, 0
        self._unwrapped = trainer.unwrapped_model
        self._constants = loose_tensors(self._unwrapped)
        named = trainer.named_parameters()
        prefix = "" if self.module is None else f"{self.module}."
        trained = trainer._trainable.so_far
        self._params = {name: p.detach() for name, p in named.items() if name in trained and name.startswith(prefix)}
        if not self._params:
            raise ValueError(
                f"`module` of EmaHook is {self.module!r}, but the model has no parameters to train in a part of that"
                f" name. Its parts: {', '.join(name for name, _ in self._unwrapped.named_children())}."
            )
        first_names = {p: name for name, p in named.items()}
        tied = self._unwrapped.named_parameters(remove_duplicate=False)
        self._first_names = {clean_name(name): first_names[p] for name, p in tied}
        self._begin_averages({})

    def _begin_averages(self, known: dict[str, torch.Tensor]) -> None:
        """Make the averages of `_params`: keep the known ones, and copy the weights of the others."""
        # These lists are made once: for many small tensors, making them costs more than the update.
        self._weights = [local_tensor(param) for param in self._params.values()]
        self._averages = [
            known[name]
            if name in known
            else weight.to(self._device or weight.device, torch.float32 if weight.dtype in _COARSE else None, copy=True)
            for name, weight in zip(self._params, self._weights, strict=True)
        ]
        pairs = zip(self._averages, self._weights, strict=True)
        self._is_direct = all((a.dtype, a.device) == (w.dtype, w.device) for a, w in pairs)

    def follow_trainable(self, trainer: BaseTrainer) -> None:
        # A parameter that was frozen until now starts with its weight. One that becomes frozen is averaged further.
        self._bind(trainer)
        known = dict(zip(self._params, self._averages, strict=True))
        prefix, trained = "" if self.module is None else f"{self.module}.", trainer._trainable.so_far | known.keys()
        named = trainer.named_parameters()
        self._params = {name: p.detach() for name, p in named.items() if name in trained and name.startswith(prefix)}
        self._begin_averages(known)
        self._copy = None

    # ------------------------------------------------------------------ the average

    def on_before_train(self, trainer: BaseTrainer) -> None:
        twins = [h for h in trainer.hooks if isinstance(h, EmaHook) and h.name == self.name]
        if len(twins) > 1:
            raise ValueError(f"The `name`s of several EmaHooks must differ, but {len(twins)} have {self.name!r}.")
        self._bind(trainer)

    def update_average(self, trainer: BaseTrainer) -> None:
        if self._is_swapped:
            raise RuntimeError("The model was trained inside `EmaHook.swapped`, which puts its weights back. Leave it.")
        if not trainer.is_due(self.update_interval):
            return
        weights = self._weights
        if not self._is_direct:
            pairs = zip(weights, self._averages, strict=True)
            weights = [weight.to(average.device, average.dtype) for weight, average in pairs]
        if trainer.step <= self.start_step or not self.num_updates:
            torch._foreach_copy_(self._averages, weights)
        else:
            torch._foreach_lerp_(self._averages, weights, 1.0 - self._decay_at(self.num_updates))
        self.num_updates += trainer.step > self.start_step

    def _decay_at(self, update: int) -> float:
        return self.decay if self._warmup is None else min(self.decay, self._warmup(update))

    # ------------------------------------------------------------------ its use

    @contextmanager
    def swapped(self, trainer: BaseTrainer) -> Iterator[None]:
        """Inside this context the model has the averaged weights, for evaluation, sampling or export. At its end, and
        after an exception, the model's own weights are back, bit for bit. Call on every rank, between steps.

        Costs a copy of this rank's shards while it is active. Inside it, no checkpoint can be saved.

        Raises:
            RuntimeError: The context is already active, or the state is saved or the model trained inside it.
        """
        self._bind(trainer)
        if self._is_swapped:
            raise RuntimeError("`EmaHook.swapped` must be left before it is entered again.")
        # Otherwise FSDP2 would go on using gathered weights instead of the shards.
        reshard(trainer.model)
        with torch.no_grad():
            backup = torch._foreach_clone(self._weights)
        self._is_swapped = True
        try:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._averages)
            with trainer._window.modes.replaced():
                yield
        finally:
            reshard(trainer.model)
            with torch.no_grad():
                torch._foreach_copy_(self._weights, backup)
            self._is_swapped = False

    @property
    def ema_model(self) -> nn.Module:
        """A copy of the model with the averaged weights, in eval mode. Each access updates and returns the same object.
        For a single process and DDP; call it on any rank.

        Raises:
            RuntimeError: The run has not begun, or the weights are sharded (FSDP2). Or the copy would use the model's
                own weights, because `forward` was replaced by a closure on the instance, or caches what it computed.
        """
        if self._model is None:
            raise RuntimeError("`ema_model` is there as soon as the run has begun, and it has not.")
        if any(map(is_dtensor, self._params.values())):
            raise RuntimeError(
                "`ema_model` needs the whole weights on one rank, but FSDP2 has sharded them. Use them in place, inside"
                f" `with hook.swapped(trainer)`, or export them from a checkpoint: `python -m trainloop checkpoints"
                f" export DIR --group {self.name}`."
            )
        averages = dict(zip(self._params, self._averages, strict=True))
        try:
            if self._copy is None:
                self._copy = ModelCopy(self._unwrapped, self._constants)
            self._copy.update(averages)
        except CopyError as ex:
            raise RuntimeError(
                f"`ema_model` cannot be a copy of this model: {ex}. Use the average in place, inside"
                " `with hook.swapped(trainer)`."
            ) from ex
        return self._copy.module

    # ------------------------------------------------------------------ state

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        if self._is_swapped:
            raise RuntimeError(
                "The state was asked for inside `EmaHook.swapped`: it would hold the averaged weights in place of the"
                " model's. Leave it first."
            )
        self._bind(trainer)
        pairs = zip(self._averages, self._params.values(), strict=True)
        averages = dict(zip(self._params, (_sharded_like(param, average) for average, param in pairs), strict=True))
        # A model's whole state: also frozen parameters, buffers and the second names of tied parameters. But without
        # entries that a module derives from its weights for `state_dict`: they would come from weights without average.
        live = trainer.live_model_state()
        made = made_entries(self._unwrapped, live)
        state_dict[self.name] = averages | {
            name: averages.get(self._first_names.get(name, name), tensor)
            for name, tensor in live.items()
            if name not in made
        }
        state_dict[f"{self.name}_hook"] = {"num_updates": self.num_updates}

    @torch.no_grad()
    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._bind(trainer)
        saved = state_dict.get(self.name)
        if saved is None:
            trainer.logger.warning(f"The checkpoint has no average {self.name!r}, so it starts from the weights.")
            return
        if missing := sorted(self._params.keys() - saved.keys()):
            raise ValueError(
                f"The saved average {self.name!r} has not the parameters: {', '.join(missing[:5])}"
                f"{', …' if len(missing) > 5 else ''}."
            )
        for (name, param), average in zip(self._params.items(), self._averages, strict=True):
            average.copy_(local_tensor(like_param(saved[name], param)))
        self.num_updates = state_dict[f"{self.name}_hook"]["num_updates"]


def _sharded_like(param: Any, local: torch.Tensor) -> torch.Tensor:
    """This rank's shard of the average as a DTensor, if `param` is one. No communication."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements
    shard = local.to(param.device)
    whole: torch.Tensor = DTensor.from_local(shard, mesh, placements, shape=param.shape, stride=param.stride())
    return whole
