"""Checks the return values of the trainer's factories, and makes the logger and the data feed."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn

from ..data.feed import DataFeed
from ..data.mixture import check_samples_per_step
from ..errors import describe
from ..hook import BaseHook, CheckpointerHook
from ..step.models import Models
from ..step.non_finite import clean_name
from ..step.optimizers import LRSchedulers, Optimizers
from .accelerate_options import check_data_loader_options
from .subclasses import check_hook

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

T = TypeVar("T")


class _FallbackHandler(logging.StreamHandler[Any]):
    """Writes to stderr until the script configures logging; after that, lines would be written twice."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger("trainloop")
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        super().emit(record)


def default_logger() -> logging.Logger:
    """The logger "trainloop", which writes on rank 0 only. If the script hasn't configured logging, the logger gets its
    own handler; otherwise a first-time user would see nothing of the run.
    """
    own = logging.getLogger("trainloop")
    if not own.hasHandlers():
        handler = _FallbackHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        own.addHandler(handler)
    if own.level == logging.NOTSET and own.handlers:
        own.setLevel(logging.INFO)
    adapter: Any = get_logger("trainloop")
    return adapter  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- what the factories returned


def check_type(value: Any, wanted: type[T], factory: str) -> T:
    """Return `value` if it is a `wanted`, else raise. `factory` is the name of the factory that returned it."""
    if not isinstance(value, wanted):
        raise TypeError(f"`{factory}` must return a {wanted.__name__}, but returned {describe(value)}.")
    return value


def check_model(model: Any) -> nn.Module:
    """Return the model if it can be prepared and trained, else raise. A mapping becomes one model of its modules."""
    if isinstance(model, Mapping) or type(model) is nn.ModuleDict:
        by_name: dict[Any, Any] = dict(model.items())
        _check_names("build_model", by_name)
        model = Models({name: check_type(module, nn.Module, "build_model") for name, module in by_name.items()})
    checked: nn.Module = check_type(model, nn.Module, "build_model")
    lazy = [name for name, p in checked.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"`build_model` must return a model with real weights, but {len(lazy)} parameters of lazy modules have no"
            f" shape yet (first: {lazy[0]}). Run one batch through the model in `build_model`."
        )
    sparse = [
        name
        for name, module in checked.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
    if sparse:
        raise ValueError(
            f"`build_model` returned embeddings with sparse gradients (first: {sparse[0]}), which can be neither"
            " clipped nor checked together with dense ones. Build them with `sparse=False`."
        )
    if not any(p.requires_grad for p in checked.parameters()):
        raise ValueError("`build_model` must return a model with at least one parameter that requires grad.")
    return checked


def check_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer if its `step` needs no closure, else raise. A mapping becomes one optimizer."""
    if isinstance(optimizer, Mapping):
        _check_names("build_optimizer", optimizer)
        return Optimizers({name: raw_optimizer(check_optimizer(part)) for name, part in optimizer.items()})
    checked: torch.optim.Optimizer = check_type(optimizer, torch.optim.Optimizer, "build_optimizer")
    raw = raw_optimizer(checked)
    if required_parameters(type(raw).step)[1:]:  # after `self`
        raise TypeError(
            f"`build_optimizer` must return an optimizer that steps once for each gradient, but {type(raw).__name__}"
            " evaluates the loss several times in a step (it needs a closure). Use a first-order one, such as AdamW."
        )
    return checked


def _check_names(factory: str, by_name: Mapping[Any, Any]) -> None:
    """Raise unless the keys of a mapping are valid names in the records and checkpoints of the run."""
    bad = [name for name in by_name if not isinstance(name, str) or not name or set("/.") & set(name)]
    if bad or not by_name:
        found = f"one is {bad[0]!r}" if bad else "there are none"
        raise ValueError(f"`{factory}` must return names that are strings without a slash or a dot, but {found}.")


def required_parameters(function: Any) -> list[str]:
    """Names of the parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def check_lr_scheduler(returned: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, str | None]:
    """The raw scheduler (a prepared one would step once per process), and the metric that it monitors, if any."""
    scheduler, monitor = returned, None
    if isinstance(returned, Mapping) and isinstance(optimizer, Optimizers) and "scheduler" not in returned:
        return _check_lr_schedulers(returned, optimizer), None
    if isinstance(returned, Mapping):
        if returned.keys() != {"scheduler", "monitor"} or not isinstance(returned["monitor"], str):
            raise ValueError(
                '`build_lr_scheduler` must return a scheduler, or {"scheduler": …, "monitor": "val/loss"}, but returned'
                f" {describe(returned)}."
            )
        scheduler, monitor = returned["scheduler"], returned["monitor"]
    if isinstance(scheduler, AcceleratedScheduler):
        scheduler = scheduler.scheduler
    if scheduler is None or (callable(getattr(scheduler, "step", None)) and hasattr(scheduler, "state_dict")):
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) != (monitor is not None):
            raise ValueError(
                f"`build_lr_scheduler` returned {type(scheduler).__name__} {'with' if monitor else 'without'} a metric."
                ' ReduceLROnPlateau, and no other, goes by one: return {"scheduler": …, "monitor": "val/loss"}.'
            )
        _check_optimizer_of(scheduler, optimizer)
        if monitor is not None:
            return scheduler, monitor
        required = required_parameters(scheduler.step) if scheduler is not None else []
        if required:
            raise TypeError(
                f"`build_lr_scheduler` must return a scheduler whose `step()` needs no argument, but that of"
                f" {type(scheduler).__module__}.{type(scheduler).__name__} needs {', '.join(required)}. Use one of"
                " `torch.optim.lr_scheduler`, or step yours in a hook's `on_after_step`."
            )
        return scheduler, None
    raise TypeError(f"`build_lr_scheduler` must return a scheduler or None, but returned {describe(scheduler)}.")


def _check_optimizer_of(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise if the scheduler moves the learning rates of another optimizer. The run's own would then stay constant."""
    moved = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    if isinstance(moved, list) and not {id(group) for group in moved} & {id(group) for group in optimizer.param_groups}:
        raise ValueError(
            f"`build_lr_scheduler` must return a scheduler of `self.optimizer`, but that of {type(scheduler).__name__}"
            " is another optimizer, so the learning rate of the run would never change."
        )


def _check_lr_schedulers(returned: Mapping[Any, Any], optimizer: Optimizers) -> LRSchedulers:
    """The schedulers of several optimizers, by the optimizers' names."""
    _check_names("build_lr_scheduler", returned)
    if unknown := [name for name in returned if name not in optimizer.by_name]:
        raise ValueError(
            f"`build_lr_scheduler` returned a schedule of {unknown[0]!r}, but the optimizers are"
            f" {', '.join(optimizer)}. Return schedules by the names of `build_optimizer`."
        )
    by_name = {}
    for name, scheduler in returned.items():
        by_name[name], monitor = check_lr_scheduler(scheduler, optimizer[name])
        if monitor is not None:
            raise ValueError(
                f"`build_lr_scheduler` returned ReduceLROnPlateau for {name!r}. It can go by a metric only as the one"
                ' schedule of all optimizers: return {"scheduler": ReduceLROnPlateau(self.optimizer), "monitor": …}.'
            )
    return LRSchedulers({name: scheduler for name, scheduler in by_name.items() if scheduler is not None})


def check_hooks(
    hooks: Any, workspace: Path | None, lr_monitor: str | None
) -> tuple[list[BaseHook], list[CheckpointerHook]]:
    """The hooks, and the checkpointers among them. Raise if one is invalid or needs a workspace that isn't set."""
    if not isinstance(hooks, Iterable):
        raise TypeError(f"`build_hooks` must return a list of hooks, but returned {describe(hooks)}.")
    checked = list(hooks)
    for hook in checked:
        if not isinstance(hook, BaseHook):
            raise TypeError(f"`build_hooks` must return objects of BaseHook, but one is {describe(hook)}.")
        check_hook(hook)
        if workspace is None and getattr(hook, "needs_workspace", False):
            raise ValueError(
                f"{type(hook).__name__} writes to `workspace`, but it is None. Pass a folder to the trainer."
            )
    check_collisions(checked, workspace if workspace is not None else Path())
    if lr_monitor is not None and not any(getattr(hook, "evaluates", False) for hook in checked):
        raise ValueError(
            f"`build_lr_scheduler` monitors {lr_monitor!r}, but there is no EvaluationHook, whose numbers it goes by."
            " Return one from `build_hooks`."
        )
    return checked, [hook for hook in checked if isinstance(hook, CheckpointerHook)]


def check_collisions(hooks: list[BaseHook], workspace: Path) -> None:
    """Raise if a hook is listed twice, or if two use the same folder, file or key in the saved state.

    A hook's method `claims` lists the things that only one hook of a run may do. Each entry is the end of a sentence,
    and the argument to change.
    """
    owners: dict[str, BaseHook] = {}
    for i, hook in enumerate(hooks):
        if any(hook is other for other in hooks[:i]):
            raise ValueError(f"`build_hooks` returned the same {type(hook).__name__} twice.")
        for claim, argument in getattr(hook, "claims", lambda workspace: [])(workspace):
            other = owners.setdefault(claim, hook)
            if other is not hook:
                names = f"a {type(other).__name__} and a {type(hook).__name__}"
                remedy = f"Leave one out{f', or give it another `{argument}`' if argument else ''}."
                raise ValueError(f"`build_hooks` returned {names} that both {claim}. {remedy}")


def check_optimizer_params(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise if the optimizer has parameters that are not in the model: they would be neither reduced nor saved. Of
    several optimizers, exactly one must have each trainable parameter.
    """
    own = set(model.parameters())
    foreign = sum(p not in own for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"`build_optimizer` must return an optimizer of `self.model`'s parameters, but {foreign} of its parameters"
            " are not in the model. Make them part of the model that `build_model` returns."
        )
    if not isinstance(optimizer, Optimizers):
        return
    owners: dict[nn.Parameter, list[str]] = {}
    for name, part in optimizer.by_name.items():
        for param in {p for group in part.param_groups for p in group["params"]}:
            owners.setdefault(param, []).append(name)
    for name, param in model.named_parameters():
        if len(owners.get(param, [])) > 1:
            raise ValueError(
                f"The optimizers {' and '.join(owners[param])} of `build_optimizer` both have the parameter"
                f" {clean_name(name)}. Give each parameter to one of them."
            )
        if param.requires_grad and param not in owners:
            raise ValueError(
                f"No optimizer of `build_optimizer` ({', '.join(optimizer)}) has the parameter {clean_name(name)}. Give"
                " it to one of them, or freeze it in `build_model` (`requires_grad_(False)`)."
            )


def choose_grad_scaler(accelerator: Accelerator, scaler: Any) -> torch.amp.GradScaler | None:
    """The grad scaler to use: that of `build_grad_scaler`, else Accelerate's own. None: there is none, or it is
    disabled. Call before `prepare`.
    """
    if scaler is not None:
        accelerator.scaler = check_type(scaler, torch.amp.GradScaler, "build_grad_scaler")
    chosen: torch.amp.GradScaler | None = accelerator.scaler
    return chosen if chosen is not None and chosen.is_enabled() else None


def raw_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


# ---------------------------------------------------------------------- Accelerate


def data_feed(loader: Any, seed: int, accelerator: Accelerator) -> DataFeed:
    """The stream of this rank's batches."""
    check_data_loader_options(loader, seed, accelerator)
    check_samples_per_step(loader, accelerator.num_processes * accelerator.gradient_accumulation_steps)
    return DataFeed(
        loader,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        non_blocking=accelerator.non_blocking,
    )


@contextmanager
def accumulation_state(trainer: BaseTrainer) -> Iterator[None]:
    """Inside this context, Accelerate's accumulation settings, which the whole process shares, are those of this run.
    At its end they are restored for the next trainer, even after an exception inside a window.
    """
    accelerator = trainer.accelerator
    state = accelerator.gradient_state
    before = dict(state.plugin_kwargs)
    state.plugin_kwargs.update(num_steps=trainer.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator.sync_gradients = True
    try:
        yield
    finally:
        state.plugin_kwargs.clear()
        state.plugin_kwargs.update(before)
        accelerator.sync_gradients = True
