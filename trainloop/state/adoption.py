"""Starts a run from another tool's checkpoint: weights, optimizer, schedule and step, under any strategy.

checkpoint/importing provides names and tensors. This module first compares all of them with the run's model and
optimizer. Only then each rank reads its own parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed

from ..checkpoint.agreement import Ranks
from ..checkpoint.importing import Foreign, ForeignOptimizer, open_foreign
from ..errors import CheckpointError
from ..ranks import collectives
from ..rng import derived_seed
from ..setup.factories import raw_optimizer
from ..setup.initial_weights import check_weights, clean_names, told
from ..step.non_finite import clean_name
from ..step.optimizers import LRSchedulers
from .live import empty_like_param
from .optimizer import load_optimizer_state, optimizer_state
from .resuming import move_schedule

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


@dataclass(frozen=True)
class _Plan:
    """The target of each tensor of a checkpoint, after all names and shapes were checked."""

    foreign: Foreign
    targets: Mapping[str, Mapping[str, torch.Tensor]]
    """By group and name in the file."""
    average_names: Mapping[str, Mapping[str, str]]
    """By group: name in the file -> parameter's name."""
    optimizer: dict[str, Any] | None
    """In the form of `optimizer_state`, with memory to be filled."""
    optimizer_targets: Mapping[str, torch.Tensor]
    cast: str
    """A sentence about casts. Empty: nothing is cast."""


def adopt(trainer: BaseTrainer, path: Path) -> dict[str, Any]:
    """Load a foreign checkpoint into a trainer that is built. Call on every rank.

    Returns:
        The state for the hooks' `on_load_state_dict`.

    Raises:
        CheckpointError: On every rank. It cannot be read, or belongs to another model or optimizer; nothing was changed
            then.
    """
    live, ranks, plans = trainer.live_model_state(), Ranks(), []
    ranks.do(lambda: plans.append(_plan(trainer, live, open_foreign(path))), _nothing, f"{path} cannot be imported")
    plan = plans[0]
    ranks.do(lambda: _read(plan), _nothing, f"{path} cannot be imported")
    foreign = plan.foreign
    trainer.step, how = _step(foreign, plan.optimizer)
    taken, notes = ["the weights"], [*foreign.not_taken]
    saved_groups = _place_schedule(trainer, foreign, taken, notes)
    if plan.optimizer is not None:
        optimizer = raw_optimizer(trainer.optimizer)
        groups = plan.optimizer["param_groups"]
        if not saved_groups:
            groups = optimizer_state(trainer.unwrapped_model, optimizer)["param_groups"]
        load_optimizer_state(trainer.unwrapped_model, optimizer, {**plan.optimizer, "param_groups": groups})
        taken.append("the optimizer's state" + (" and parameter groups" if saved_groups else ""))
    if trainer.grad_scaler is not None and foreign.grad_scaler is not None:
        trainer.grad_scaler.load_state_dict(foreign.grad_scaler)
        taken.append("the loss scale")
    if trainer.step:
        assert trainer.seed is not None, "the trainer is built"
        set_seed(derived_seed(trainer.seed, trainer.step, collectives.rank()))
    averages = {
        group: {name: plan.targets[group][key] for key, name in names.items()}
        for group, names in plan.average_names.items()
    }
    taken += [f"the average {group!r}, for an `EmaHook` of that name" for group in averages]
    trainer.logger.info(
        f"{path} is {foreign.what}. Loaded from it: {', '.join(taken)}. The run continues after step {trainer.step}"
        f" ({how})."
    )
    trainer.logger.warning(
        f"{path}: not loaded from it: {'; '.join(notes)}. The data starts at its first epoch.{plan.cast}"
    )
    return {"model": live, **foreign.hooks, **averages}


def adopt_weights(trainer: BaseTrainer, path: Path, average: str | None) -> None:
    """Load the weights of a foreign checkpoint, or an average of them, into the model. Call on every rank.

    Raises:
        CheckpointError: On every rank. It cannot be read, or belongs to another model; nothing was changed then.
    """
    live, ranks, plans = trainer.live_model_state(), Ranks(), []

    def plan() -> None:
        foreign = open_foreign(path)
        if average is not None and average not in foreign.weights:
            averages = ", ".join(group for group in foreign.weights if group != "model") or "none"
            raise CheckpointError(f"{path} has no average {average!r}. Its averages: {averages}")
        described = foreign.weights["model"].described()
        check_weights(path, described, clean_names(described, live), live)
        for source in [foreign.weights[group] for group in ("model", average) if group is not None]:
            names = clean_names(source.described(), live)
            plans.append((source, {key: live[name] for key, name in names.items() if name in live}))

    ranks.do(plan, _nothing, f"{path} cannot be imported")
    for source, targets in plans:
        ranks.do(partial(source.read_into, targets), _nothing, f"{path} cannot be imported")


# ---------------------------------------------------------------------- what goes where


def _plan(trainer: BaseTrainer, live: dict[str, torch.Tensor], foreign: Foreign) -> _Plan:
    params = trainer.named_parameters()
    described = foreign.weights["model"].described()
    names = clean_names(described, live)
    check_weights(foreign.path, described, names, live)
    targets: dict[str, dict[str, torch.Tensor]] = {"model": {key: live[name] for key, name in names.items()}}
    average_names: dict[str, dict[str, str]] = {}
    for group, source in foreign.weights.items():
        if group != "model":
            described = source.described()
            average_names[group] = clean_names(described, live)
            targets[group] = {
                key: empty_like_param(params.get(name), *described[key], on_host=False)
                for key, name in average_names[group].items()
            }
    optimizer: dict[str, Any] | None = None
    optimizer_targets: dict[str, torch.Tensor] = {}
    if foreign.optimizer is not None:
        optimizer, optimizer_targets = _plan_optimizer(trainer, foreign.path, foreign.optimizer)
    dtypes = {(dtype, live[names[key]].dtype) for key, (_, dtype) in foreign.weights["model"].described().items()}
    casts = sorted(f"{saved} to {own}" for saved, own in dtypes if saved != own)
    cast = f" Weights were cast: {', '.join(casts).replace('torch.', '')}." if casts else ""
    return _Plan(foreign, targets, average_names, optimizer, optimizer_targets, cast)


def _plan_optimizer(
    trainer: BaseTrainer, path: Path, source: ForeignOptimizer
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    params = trainer.named_parameters()
    own = optimizer_state(trainer.unwrapped_model, raw_optimizer(trainer.optimizer))["param_groups"]
    names, groups = _match_groups(path, source.param_groups, own)
    state: dict[str, dict[str, Any]] = {names[key]: dict(values) for key, values in source.values.items()}
    targets = {}
    for full_name, (shape, dtype) in source.tensors.described().items():
        key, value_name = full_name.rsplit("/", 1)
        name = names.get(key, names.get(int(key)) if key.isdecimal() else None)
        if name is None:
            raise CheckpointError(f"{path} holds optimizer state of {key}, which is in none of its parameter groups")
        _check_shape(path, name, value_name, shape, tuple(params[name].shape))
        group = next(group for group in own if name in group["params"])
        on_host = not shape and not (group.get("fused") or group.get("capturable"))
        targets[full_name] = state.setdefault(name, {})[value_name] = empty_like_param(
            params[name], shape, dtype, on_host=on_host
        )
    return {"state": state, "param_groups": groups}, targets


def _match_groups(
    path: Path, saved: list[dict[str, Any]], own: list[dict[str, Any]]
) -> tuple[dict[int | str, str], list[dict[str, Any]]]:
    """The parameter for each key, found by its name or its position; and the saved groups with the run's names."""
    remedy = "To take nothing but the weights, name their file, or read them in `build_model`"
    if len(saved) != len(own):
        raise CheckpointError(
            f"The optimizer in {path} has {len(saved)} parameter groups, here it has {len(own)}. {remedy}"
        )
    names: dict[int | str, str] = {}
    for i, (saved_group, own_group) in enumerate(zip(saved, own, strict=True)):
        keys, own_names = saved_group["params"], own_group["params"]
        by_name = {clean_name(key): key for key in keys if isinstance(key, str)}
        if by_name and (difference := sorted(set(by_name) ^ set(own_names))):
            raise CheckpointError(
                f"Parameter group {i} of the optimizer in {path} holds other parameters than here."
                f" {told('differ', difference)} {remedy}"
            )
        if len(keys) != len(own_names):
            raise CheckpointError(
                f"Parameter group {i} of the optimizer in {path} holds {len(keys)} parameters, here {len(own_names)}."
                f" {remedy}"
            )
        pairs = ((by_name[name], name) for name in own_names) if by_name else zip(keys, own_names, strict=True)
        names.update(pairs)
    return names, [{**s, "params": o["params"]} for s, o in zip(saved, own, strict=True)]


def _check_shape(path: Path, name: str, value_name: str, shape: tuple[int, ...], own: tuple[int, ...]) -> None:
    """Check a state's shape. A factored second moment may have fewer dimensions, or some of size 1."""
    if len(shape) == len(own) and any(n not in (1, m) for n, m in zip(shape, own, strict=True)):
        raise CheckpointError(
            f"The optimizer's {value_name} of {name} in {path} is {list(shape)}, but the parameter is {list(own)}: it"
            " was saved with another order of the parameters, or of another model"
        )


# ---------------------------------------------------------------------- putting it there


def _read(plan: _Plan) -> None:
    for group, targets in plan.targets.items():
        plan.foreign.weights[group].read_into(targets)
    if plan.foreign.optimizer is not None:
        plan.foreign.optimizer.tensors.read_into(plan.optimizer_targets)


def _step(foreign: Foreign, optimizer: dict[str, Any] | None) -> tuple[int, str]:
    """The step that the run continues after, and how it was found."""
    if foreign.step is not None:
        return foreign.step, "the checkpoint says it"
    states = optimizer["state"].values() if optimizer is not None else ()
    counters = [int(state["step"]) for state in states if "step" in state]
    if counters:
        return max(counters), "by the optimizer's step counters"
    position = (foreign.lr_scheduler or {}).get("last_epoch")
    if isinstance(position, int) and position > 0 and position % foreign.num_processes == 0:
        # SGD has no step counters. A prepared schedule moves once per process in each step.
        step, each = position // foreign.num_processes, foreign.num_processes
        how = f"by its schedule alone, which stood at {position}: {each} a step"
        return step, f"{how}; if it moved otherwise, set `trainer.step` in a hook's `on_before_train`"
    return 0, "nothing in it counts steps"


def _place_schedule(trainer: BaseTrainer, foreign: Foreign, taken: list[str], notes: list[str]) -> bool:
    """Move the learning rate to the step. Returns whether the saved parameter groups, which contain it, are used."""
    own, saved, step = trainer.lr_scheduler, foreign.lr_scheduler, trainer.step
    if own is None:
        if saved is not None:
            notes.append("the learning rate schedule, since this run has none")
        return True
    if saved is not None and saved.get("last_epoch") == step and not isinstance(own, LRSchedulers):
        own.load_state_dict(saved)
        taken.append("the learning rate schedule")
        return True
    if saved is not None:
        notes.append(
            f"the learning rate schedule, which stood at {saved.get('last_epoch')} after {step} steps (a prepared one"
            " moves once for each process)"
        )
    move_schedule(own, step)
    if step:
        notes.append(f"the parameter groups' hyperparameters: this run's own schedule was moved to step {step}")
    return not step


def _nothing(*_: Any) -> None:
    return None
