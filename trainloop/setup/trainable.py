"""Changes which parameters are trained, between two steps, and updates everything that depends on it.

set_trainable ─► requires_grad         at once, on this rank
next window   ─► the ranks agree ─► DDP's buckets, FSDP2's dtypes, the checks of a window, averages

An optimizer skips a parameter without a gradient, so a frozen one gets neither an update nor weight decay. Its state is
kept, because the parameter may be trained again.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import describe
from ..ranks import collectives
from ..ranks.alike import agree
from ..step.gradient_checks import ddp_modules
from .buckets import settle_buckets

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_NUM_TOLD = 4


class Trainable:
    """The parameters that are trained, by clean name.

    Args:
        trainer: The trainer. It must be built.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._built = self._in_force = self._now()
        self._earlier: set[str] = set()  # parameters that were trained before the last change
        self._is_set = self._is_changed = False
        self._told = ""

    @property
    def so_far(self) -> set[str]:
        """The parameters that are trained now or were trained in an earlier step. These are averaged."""
        return self._now() | self._earlier

    def select(self, patterns: Iterable[str] | str) -> None:
        """Train the parameters that match a pattern, and freeze the others. See `BaseTrainer.set_trainable`."""
        window = self._trainer._window
        if window.is_in_step and window.has_run:
            raise RuntimeError(
                f"`set_trainable` was called in the middle of step {self._trainer.step}. Call it in a hook's"
                " `on_before_step` or `on_after_step`, or before `train`."
            )
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        if not given or not all(isinstance(pattern, str) for pattern in given):
            raise ValueError(f'`patterns` must be names or patterns such as "head.*", but is {describe(patterns)}.')
        params = self._trainer.named_parameters()
        for pattern in given:
            if not any(fnmatchcase(name, pattern) for name in params):
                raise ValueError(
                    f"`patterns` has {pattern!r}, but no parameter has such a name. The first ones are"
                    f" {', '.join(list(params)[:_NUM_TOLD])}."
                )
        names = {name for name in params if any(fnmatchcase(name, pattern) for pattern in given)}
        self._change(names, f"set_trainable({', '.join(map(repr, given))})")
        self._is_set = True

    def state_dict(self) -> dict[str, list[str]] | None:
        """The state for a checkpoint. None: the trained parameters are those of `build_model`."""
        return {"now": sorted(self._now()), "earlier": sorted(self._earlier)} if self._is_set else None

    def load_state_dict(self, saved: dict[str, list[str]] | None) -> None:
        """Restore what `state_dict` returned. If the run is restored at its start and the checkpoint has no such state,
        the script's choice stays.
        """
        if saved is not None:
            self._change(set(saved["now"]), "parameters that were trained in the saved run")
            self._earlier, self._is_set = set(saved["earlier"]), True
        elif self._trainer._is_restored:
            self._change(self._built, "parameters that `build_model` leaves trainable")
            self._earlier, self._is_set = set(), False

    def take_effect(self) -> None:
        """Apply the change to everything that depends on it. Call on every rank, after all hooks' `on_before_step` or
        `on_after_step`.

        Raises:
            RankDisagreementError: Not all ranks make the same change.
        """
        if not self._is_changed:
            return
        trainer = self._trainer
        next_step = trainer.step + (not trainer._window.is_in_step)
        agree(trainer.control, trainer.peers, next_step, self._told)
        self._is_changed = False
        names = self._now()
        if next_step > 1:
            self._earlier |= self._in_force
        self._in_force = names
        for ddp in ddp_modules(trainer.model):
            _renew_reducer(ddp)
        settle_buckets(trainer.model)
        _renew_fsdp2(trainer.model)
        trainer._window.follow_trainable()
        for averager in trainer.averagers:
            averager.follow_trainable(trainer)
        params = trainer.named_parameters()
        size = sum(params[name].numel() for name in names)
        trainer.logger.info(
            f"From step {next_step} on, {len(names)} of {len(params)} parameters are trained ({size:,} elements)."
        )

    def _now(self) -> set[str]:
        return {name for name, param in self._trainer.named_parameters().items() if param.requires_grad}

    def _change(self, names: Collection[str], told: str) -> None:
        if names == self._now():
            return
        params = self._trainer.named_parameters()
        if unknown := sorted(set(names) - params.keys()):
            raise ValueError(f"The saved run trained parameters that the model has not: {', '.join(unknown[:5])}.")
        self._check_new({name: params[name] for name in params if name in names and not params[name].requires_grad})
        for name, param in params.items():
            param.requires_grad = name in names
        self._is_changed, self._told = True, told

    def _check_new(self, params: dict[str, nn.Parameter]) -> None:
        """Raise unless these frozen parameters can be trained."""
        groups = self._trainer._raw_optimizer.param_groups
        optimized = {param for group in groups for param in group["params"]}
        wrapped = list(ddp_modules(self._trainer.model))
        reduced = {param for ddp in wrapped for param in ddp.module.parameters()}
        for name, param in params.items():
            if not (param.is_floating_point() or param.is_complex()):
                raise ValueError(
                    f"{name} cannot be trained: its dtype is {param.dtype}. Give `set_trainable` narrower patterns."
                )
            if param not in optimized:
                raise ValueError(
                    f"{name} cannot be trained, since the optimizer does not have it. Let `build_optimizer` return an"
                    " optimizer of all parameters that are ever trained, frozen ones too: it skips those without a"
                    " gradient."
                )
            if wrapped and param not in reduced:
                raise ValueError(
                    f"{name} cannot be trained, since Accelerate has not wrapped its module, all of which was frozen"
                    " in `build_model`. Leave it trainable there, and freeze it with `set_trainable` before `train`."
                )


def _renew_reducer(ddp: DistributedDataParallel) -> None:
    """Make DDP reduce the gradients of the parameters that require grad now. DDP knows only those that did when it was
    built, and waits for each of them. This repeats a part of DDP's constructor, so hooks and options stay.
    """
    if ddp._use_python_reducer:
        raise ValueError(
            '`set_trainable` does not work with `torch._dynamo.config.optimize_ddp = "python_reducer"`. Leave it out.'
        )
    trained: Any = ddp
    # If there is nothing to reduce, a forward pass must not make DDP wait for gradients.
    ddp.require_backward_grad_sync = any(param.requires_grad for param in trained._module_parameters)
    if not ddp.require_backward_grad_sync:
        return
    params, expects_sparse = trained._build_params_for_reducer()
    names = trained._build_debug_param_to_name_mapping(params)
    is_static = ddp.static_graph
    trained._ddp_init_helper(params, expects_sparse, names, is_static)
    ddp._has_rebuilt_buckets = False
    hooks, trained._comm_hooks = trained._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    if is_static:
        ddp.static_graph = False
        trained._set_static_graph()


def _renew_fsdp2(model: nn.Module) -> None:
    """Make FSDP2 notice which parameters require grad now. It copies this when it gathers them, and it knows the dtypes
    only of units that had trained parameters.
    """
    collectives.reshard(model)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if not isinstance(module, fsdp.FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
            try:
                group._init_mp_dtypes()
            except AssertionError as ex:
                raise ValueError(
                    f"FSDP2 cannot train these parameters together: {ex}. Give parameters of one dtype to a unit that"
                    " it wraps, or train them with DDP."
                ) from ex
