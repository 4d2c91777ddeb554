"""The phases of a step: each has its own forward pass, gradient, update and schedule, over the same window.

In most trainers a step has one phase, which is the whole step. A GAN has a phase for the discriminator, and then one
for the generator:

begin ─► phase 1: window ─► norm ─► update     parameters of phase 2 don't require grad in phase 1
         phase 2: the same batches ─► …        if its gradient is not finite, only phase 2 is repeated, with new batches
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..ranks.alike import agree
from ..ranks.collectives import reshard
from .gradient_checks import ddp_modules
from .gradients import Gradients
from .info import StepInfo
from .optimizers import Optimizers, optimizers_of, schedulers_of
from .update import Update

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class Phase:
    """The only phase of a step, with all parameters, all optimizers and all schedules. Use it as a context manager.

    Args:
        trainer: The trainer. It must be built.
    """

    name: str | None = None
    is_last = True

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._schedule = trainer.lr_scheduler if trainer.lr_monitor is None else None
        trainer._update = Update(trainer, trainer._gradients, trainer._agreement, trainer._raw_optimizer)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass

    def finish(self) -> None:
        """Move the learning rate, after the update. The last phase also ends the update of the step."""
        if self._schedule is not None:
            self._schedule.step()
        if self.is_last:
            self._trainer._window.finish_update()


class NamedPhase(Phase):
    """One of several phases, with the parameters, optimizer and schedule of its name. Inside this context the trainer
    uses them, and no other parameter requires grad.

    Args:
        trainer: The trainer. It must be built.
        name: Name of the phase and of its optimizer.
    """

    def __init__(self, trainer: BaseTrainer, name: str) -> None:
        self.name = name
        self._trainer = trainer
        self._schedule = schedulers_of(trainer.lr_scheduler).get(name)
        optimizer = optimizers_of(trainer._raw_optimizer)[name]
        own = {param for group in optimizer.param_groups for param in group["params"]}
        self._own = [param for param in trainer.model.parameters() if param in own]
        clip = trainer.grad_clip.get(name) if isinstance(trainer.grad_clip, Mapping) else trainer.grad_clip
        self._gradients = Gradients(self._own, clip, trainer.grad_scaler, optimizer)
        self._update = Update(trainer, self._gradients, trainer._agreement, optimizer)
        groups = list(map(id, trainer._raw_optimizer.param_groups))
        first = groups.index(id(optimizer.param_groups[0]))
        self._groups = slice(first, first + len(optimizer.param_groups))
        self._others: list[nn.Parameter] = []
        self._foreign = [ddp for ddp in ddp_modules(trainer.model) if own.isdisjoint(ddp.parameters())]
        self._idle: list[DistributedDataParallel] = []

    def __enter__(self) -> None:
        trainer = self._trainer
        own = set(self._own)
        self._others = [p for p in trainer.model.parameters() if p.requires_grad and p not in own]
        for param in self._others:
            param.requires_grad = False
        # A forward pass makes DDP wait for gradients, which these modules don't get here. In the next phase DDP would
        # then reduce too early.
        self._idle = [ddp for ddp in self._foreign if ddp.require_backward_grad_sync]
        for ddp in self._idle:
            ddp.require_backward_grad_sync = False
        trainer.phase, trainer._gradients, trainer._update = self.name, self._gradients, self._update
        self._step_info = trainer.step_info
        trainer.step_info = StepInfo()

    def __exit__(self, *exc_info: object) -> None:
        trainer = self._trainer
        for param in self._others:
            param.requires_grad = True
        for ddp in self._idle:
            ddp.require_backward_grad_sync = True
        reshard(trainer.model)  # FSDP2 keeps what it gathered in a forward pass without a backward pass
        trainer.phase = None
        assert self.name is not None
        info, phase_info = self._step_info, trainer.step_info
        info.add_phase(self.name, phase_info)
        if phase_info.lr:
            info.lr = info.lr or [group.get("lr") for group in trainer._raw_optimizer.param_groups]
            info.lr[self._groups] = phase_info.lr
        trainer.step_info = info


class Phases:
    """The phases of a trainer's steps.

    Args:
        trainer: The trainer. It must be built.

    Raises:
        ValueError: Optimizers, schedules or `grad_clip` don't match the names of the phases.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._only: list[Phase] = []
        self._by_name: dict[str, Phase] = {}
        self._agreed = ""
        if not trainer._has_phases():
            self._only = [Phase(trainer)]
            return
        self._by_name = {name: NamedPhase(trainer, name) for name in optimizers_of(trainer._raw_optimizer)}

    def of_step(self) -> list[Phase]:
        """The phases of the step that has begun, in order.

        Raises:
            RankDisagreementError: `phases` returned other names on another rank.
            ValueError: It did not return distinct names of optimizers.
        """
        if self._only:
            return self._only
        trainer = self._trainer
        names = trainer.phases()
        if (told := f"phases {names!r}") != self._agreed:
            agree(trainer.control, trainer.peers, trainer.step, told)
            self._agreed = told
        is_sequence = isinstance(names, list | tuple)
        if not is_sequence or not names or len(set(names)) != len(names) or not set(names) <= self._by_name.keys():
            raise ValueError(
                f"`phases` must return a tuple of different names out of those of the optimizers"
                f" ({', '.join(self._by_name)}), but returned {names!r}."
            )
        phases = [self._by_name[name] for name in names]
        for phase in phases:
            phase.is_last = phase is phases[-1]
        return phases


def check_phases(trainer: BaseTrainer) -> None:
    """Check the optimizers, the schedules and `grad_clip` against the phases, when they have been built.

    Raises:
        ValueError: Optimizers, schedules or `grad_clip` don't match the names of the phases.
    """
    names = optimizers_of(trainer._raw_optimizer).keys()
    if not trainer._has_phases():
        if isinstance(trainer.grad_clip, Mapping):
            raise ValueError("`grad_clip` may be a mapping only if there are phases. Pass one number.")
        return
    if not isinstance(trainer._raw_optimizer, Optimizers):
        raise ValueError(
            "`phases` is overridden, so `build_optimizer` must return a mapping from the names of the phases to their"
            " optimizers, but it returned one optimizer."
        )
    if "" in schedulers_of(trainer.lr_scheduler):
        raise ValueError(
            "`phases` is overridden, so `build_lr_scheduler` must return a mapping from the names of phases to their"
            " schedules, or None, but it returned one schedule."
        )
    if isinstance(trainer.grad_clip, Mapping) and (unknown := sorted(set(trainer.grad_clip) - set(names))):
        raise ValueError(f"`grad_clip` names {unknown[0]!r}, but the phases are {', '.join(names)}.")


def follow_requires_grad(model: nn.Module) -> None:
    """Make the parameters that FSDP2 gathers require grad exactly if their shards do. FSDP2 creates the gathered
    parameters once, so it would not notice that a phase has frozen the shards.
    """
    from torch.distributed.fsdp import FSDPModule

    for unit in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        own = [
            (part._parameters, key, param)
            for part in _without_units(unit, FSDPModule)
            for key, param in part._parameters.items()
            if param is not None
        ]

        def after_gathering(module: nn.Module, args: object, own: Any = own) -> None:
            for parameters, key, shard in own:
                parameters[key].requires_grad = shard.requires_grad

        unit.register_forward_pre_hook(after_gathering)


def _without_units(module: nn.Module, unit: type) -> Iterator[nn.Module]:
    """A module and its parts, without the parts that FSDP2 gathers by themselves."""
    yield module
    for child in module.children():
        if not isinstance(child, unit):
            yield from _without_units(child, unit)
