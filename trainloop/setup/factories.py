"""What the trainer does before its loop: checking what it was given, and preparing it through Accelerate."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import convert_to_fp32
from torch import nn

from ..data.feed import DataFeed
from ..data.mixture import check_samples_per_step
from ..errors import describe
from ..hook import BaseHook, CheckpointerHook
from ..ranks import collectives
from .accelerate_options import check_data_loader_options, restore_noise_in_checkpointed_layers
from .buckets import settle_buckets
from .forward_methods import add_forward_methods, check_forward_methods
from .launch import choose_fsdp2_precision
from .statistics import full_precision_statistics
from .subclasses import check_hook

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

T = TypeVar("T")


class _FallbackHandler(logging.StreamHandler[Any]):
    """Writes to stderr until the script configures logging, so that no line is written twice from then on."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger("trainloop")
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        super().emit(record)


def default_logger() -> logging.Logger:
    """The logger "trainloop", which writes on rank 0 only. If the script hasn't configured logging, the logger gets a
    handler of its own; otherwise a first-time user would see nothing of the run.
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
    """What the factory of that name returned, if it is a `wanted`."""
    if not isinstance(value, wanted):
        raise TypeError(f"`{factory}` must return a {wanted.__name__}, but returned {describe(value)}.")
    return value


def check_model(model: Any) -> nn.Module:
    """`model`, if it is one that can be prepared and trained."""
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
    on_meta = [name for name, p in checked.named_parameters() if p.is_meta]
    if on_meta:
        raise ValueError(
            f"`build_model` must return a model with real weights, but {len(on_meta)} parameters are on the meta device"
            f" (first: {on_meta[0]}): Accelerate would give all of the optimizer's slots to one parameter. Build it on"
            " the CPU on every rank, or call `model.to_empty(device='cpu')` and initialise it."
        )
    if not any(p.requires_grad for p in checked.parameters()):
        raise ValueError("`build_model` must return a model with at least one parameter that requires grad.")
    return checked


def check_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer, if it is one whose `step` can be called alone."""
    checked: torch.optim.Optimizer = check_type(optimizer, torch.optim.Optimizer, "build_optimizer")
    raw = raw_optimizer(checked)
    if _required_parameters(type(raw).step)[1:]:  # after `self`
        raise TypeError(
            f"`build_optimizer` must return an optimizer that steps once for each gradient, but {type(raw).__name__}"
            " evaluates the loss several times in a step (it needs a closure). Use a first-order one, such as AdamW."
        )
    return checked


def _required_parameters(function: Any) -> list[str]:
    """Names of the parameters that a call must give."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def check_lr_scheduler(returned: Any) -> tuple[Any, str | None]:
    """The raw scheduler, because a prepared one would step once for each process, and the metric that it monitors."""
    scheduler, monitor = returned, None
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
        if monitor is not None:
            return scheduler, monitor
        required = _required_parameters(scheduler.step) if scheduler is not None else []
        if required:
            raise TypeError(
                f"`build_lr_scheduler` must return a scheduler whose `step()` needs no argument, but that of"
                f" {type(scheduler).__module__}.{type(scheduler).__name__} needs {', '.join(required)}. Use one of"
                " `torch.optim.lr_scheduler`, or step yours in a hook's `on_after_step`."
            )
        return scheduler, None
    raise TypeError(f"`build_lr_scheduler` must return a scheduler or None, but returned {describe(scheduler)}.")


def check_hooks(
    hooks: Any, workspace: Path | None, lr_monitor: str | None
) -> tuple[list[BaseHook], list[CheckpointerHook]]:
    """The hooks, and the checkpointers among them, if each can be called and has the workspace that it needs."""
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
    """Raise if a hook is there twice, or if two want the same folder, file or place in the saved state.

    A hook's method `claims` lists what only one hook of a run may do: the end of a sentence, and what to change.
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
    """Raise if the optimizer updates what the model doesn't hold: it would be neither reduced nor saved."""
    own = set(model.parameters())
    foreign = sum(p not in own for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"`build_optimizer` must return an optimizer of `self.model`'s parameters, but {foreign} of its parameters"
            " are not in the model. Make them part of the model that `build_model` returns."
        )


def choose_grad_scaler(accelerator: Accelerator, scaler: Any) -> torch.amp.GradScaler | None:
    """The grad scaler in force: what `build_grad_scaler` returned, else Accelerate's own; None: there is none, or it is
    switched off. Call before `prepare`.
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


def prepare(trainer: BaseTrainer, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Prepare model and optimizer together. What is prepared already is used as it is."""
    accelerator = trainer.accelerator
    forward_methods = check_forward_methods(trainer.unwrap(model), trainer.forward_methods)
    if getattr(model, "_is_accelerate_prepared", False) and isinstance(optimizer, AcceleratedOptimizer):
        restore_noise_in_checkpointed_layers(model)
        settle_buckets(model)
        add_forward_methods(accelerator, trainer.unwrap(model), model, forward_methods, returns_fp32=False)
        return model, optimizer
    check_optimizer_params(raw_optimizer(optimizer), model)
    returns_fp32 = False
    if accelerator.is_fsdp2:
        returns_fp32 = choose_fsdp2_precision(accelerator)
        plugin = accelerator.state.fsdp_plugin
        if plugin.cpu_ram_efficient_loading and (_has_persistent_buffers(model) or _has_root_parameters(model)):
            plugin.cpu_ram_efficient_loading = False  # Accelerate's loading crashes on them; ours follows
        if not plugin.cpu_ram_efficient_loading:
            collectives.share_rank_zero_weights(model, accelerator.device)
    with full_precision_statistics() if accelerator.is_fsdp2 else nullcontext():
        prepared: tuple[nn.Module, Any] = accelerator.prepare(model, optimizer)
    restore_noise_in_checkpointed_layers(prepared[0])
    settle_buckets(prepared[0])
    add_forward_methods(accelerator, trainer.unwrap(model), prepared[0], forward_methods, returns_fp32)
    if returns_fp32:  # as autocast does under DDP, so that the loss is computed in fp32
        prepared[0].register_forward_hook(lambda module, args, output: convert_to_fp32(output))
    return prepared


def _has_root_parameters(model: nn.Module) -> bool:
    """Whether parameters belong to the model itself and not to a part of it."""
    return any("." not in name for name, _ in model.named_parameters())


def _has_persistent_buffers(model: nn.Module) -> bool:
    return bool(model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)})


@contextmanager
def accumulation_state(trainer: BaseTrainer) -> Iterator[None]:
    """Accelerate's accumulation settings, which are shared by the whole process, as this run needs them; left behind
    usable by the next trainer, also after an exception in mid-window.
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
