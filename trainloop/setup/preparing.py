"""Prepares model and optimizer with Accelerate: moves, wraps and shards them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, convert_to_fp32
from torch import nn

from ..ranks import collectives
from ..step.models import Models, modules_of
from ..step.non_finite import clean_name
from ..step.optimizers import Optimizers, optimizers_of
from ..step.phases import follow_requires_grad
from .accelerate_options import restore_noise_in_checkpointed_layers
from .buckets import settle_buckets
from .factories import check_optimizer_params, raw_optimizer
from .forward_methods import add_forward_methods, check_forward_methods
from .launch import choose_fsdp2_precision
from .statistics import full_precision_statistics

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


@dataclass(frozen=True)
class Sharded:
    """A model that FSDP2 has sharded before the optimizer was built."""

    model: nn.Module
    returns_fp32: bool


def shard_without_values(trainer: BaseTrainer, model: nn.Module) -> Sharded:
    """Shard a model with tensors on the meta device. Build its optimizer afterwards, from the shards."""
    accelerator = trainer.accelerator
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # rank 0 has no weights to send
    returns_fp32 = _begin_fsdp2(trainer, model)
    with full_precision_statistics():
        if not isinstance(model, Models):
            return Sharded(_shard_alone(accelerator, model), returns_fp32)
        accelerator.state.fsdp_plugin.set_auto_wrap_policy(model)  # the policy may name classes of any module
        prepared = {name: _shard_alone(accelerator, module) for name, module in model.items()}
    unwrapped = Models({name: trainer.unwrap(module) for name, module in model.items()})
    return Sharded(Models(prepared, unwrapped), returns_fp32)


def _shard_alone(accelerator: Any, module: nn.Module) -> nn.Module:
    """Shard a module. Accelerate requires an optimizer with it, so this passes one that is not used."""
    prepared: nn.Module
    prepared, _ = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.0))
    accelerator._optimizers.pop()
    return prepared


def _begin_fsdp2(trainer: BaseTrainer, model: nn.Module) -> bool:
    """Choose FSDP2's settings, and give all ranks the same weights if FSDP2 doesn't. Returns whether the model's output
    must be cast to fp32.
    """
    accelerator = trainer.accelerator
    returns_fp32 = choose_fsdp2_precision(accelerator)
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading and (_has_persistent_buffers(model) or _has_root_parameters(model)):
        plugin.cpu_ram_efficient_loading = False  # Accelerate's loading crashes on them; ours is used instead
    if not plugin.cpu_ram_efficient_loading:
        collectives.share_rank_zero_weights(model, accelerator.device)
    return returns_fp32


def prepare(
    trainer: BaseTrainer, model: nn.Module, optimizer: Any, sharded: Sharded | None = None
) -> tuple[nn.Module, Any]:
    """Prepare model and optimizer together. Objects that are already prepared are used as they are."""
    accelerator = trainer.accelerator
    unwrapped = trainer.unwrap(model)
    forward_methods = check_forward_methods(unwrapped, trainer.forward_methods)
    returns_fp32 = False
    if getattr(model, "_is_accelerate_prepared", False) and isinstance(optimizer, AcceleratedOptimizer | Optimizers):
        prepared = model
    else:
        check_optimizer_params(raw_optimizer(optimizer), model)
        if sharded is not None:
            prepared, returns_fp32 = sharded.model, sharded.returns_fp32
            if not isinstance(model, Models):
                optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            if accelerator.is_fsdp2:
                returns_fp32 = _begin_fsdp2(trainer, model)
            with full_precision_statistics() if accelerator.is_fsdp2 else nullcontext():
                if isinstance(model, Models):
                    prepared, optimizer = _prepare_models(trainer, model, optimizer)
                else:
                    with _unused_parameters(trainer, model, optimizer):
                        prepared, optimizer = accelerator.prepare(model, optimizer)
    _check_muon(raw_optimizer(optimizer), prepared)
    for own, module in zip(modules_of(trainer.unwrap(prepared)), modules_of(prepared), strict=True):
        restore_noise_in_checkpointed_layers(module)
        settle_buckets(module)
        names = [name for name in forward_methods if hasattr(own, name)]
        add_forward_methods(accelerator, own, module, names, returns_fp32)
        if returns_fp32:  # as autocast does under DDP, so that the loss is computed in fp32
            module.register_forward_hook(lambda module, args, output: convert_to_fp32(output))
    if accelerator.is_fsdp2 and trainer._has_phases():
        follow_requires_grad(prepared)
    return prepared, optimizer


def _prepare_models(trainer: BaseTrainer, models: Models, optimizer: Any) -> tuple[Models, Any]:
    """Prepare each module of a mapping by itself. For FSDP2, Accelerate takes only one module with its optimizer. So
    each module gets a temporary optimizer, and the parameters of the real optimizers are replaced here.
    """
    accelerator = trainer.accelerator
    prepared = {}
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.set_auto_wrap_policy(models)  # the policy may name classes of any module
    for name, module in models.items():
        if accelerator.is_fsdp2:
            with _parameters_by_name(raw_optimizer(optimizer), module):
                prepared[name] = _shard_alone(accelerator, module)
        else:
            with _unused_parameters(trainer, module, optimizer):
                prepared[name] = accelerator.prepare(module)
    if not accelerator.is_fsdp2:
        optimizer = accelerator.prepare(optimizer)
    unwrapped = Models({name: trainer.unwrap(module) for name, module in models.items()})
    return Models(prepared, unwrapped), optimizer


def _check_muon(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise if `torch.optim.Muon` has a matrix with fewer rows than shards. Otherwise torch would fail at the first
    update, with an unclear error.
    """
    muon = getattr(torch.optim, "Muon", None)
    names = {param: clean_name(name) for name, param in model.named_parameters()}
    for part in optimizers_of(optimizer).values():
        params: list[Any] = [param for group in part.param_groups for param in group["params"]]
        for param in params if muon is not None and isinstance(part, muon) else []:
            cuts = zip(param.placements, param.device_mesh.shape, strict=True) if hasattr(param, "device_mesh") else []
            if size := next((size for cut, size in cuts if cut.is_shard() and param.shape[cut.dim] < size), None):
                shape = " x ".join(map(str, param.shape))
                raise ValueError(
                    f"`torch.optim.Muon` cannot update {names[param]} ({shape}), which FSDP2 has cut into {size} shards"
                    ". Give it to another optimizer, as is usual for the first and last layers, or train with DDP."
                )


@contextmanager
def _parameters_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> Iterator[None]:
    """Inside this context, the optimizer's groups hold names instead of the module's parameters, which are about to be
    replaced by shards. So nothing keeps the whole parameters alive.
    """
    groups = optimizer.param_groups
    names = {param: clean_name(name) for name, param in module.named_parameters()}
    for group in groups:
        group["params"] = [names.get(param, param) for param in group["params"]]
    names.clear()
    yield
    params = {clean_name(name): param for name, param in module.named_parameters()}
    for group in groups:
        group["params"] = [params[param] if isinstance(param, str) else param for param in group["params"]]


@contextmanager
def _unused_parameters(trainer: BaseTrainer, module: nn.Module, optimizer: Any) -> Iterator[None]:
    """Inside this context, DDP is built to look for unused parameters, if each phase trains only a part of the module's
    parameters.
    """
    params, accelerator = set(module.parameters()), trainer.accelerator
    parts = optimizers_of(raw_optimizer(optimizer)).values()
    num_phases = sum(any(p in params for group in part.param_groups for p in group["params"]) for part in parts)
    given = accelerator.ddp_handler
    if trainer._has_phases() and num_phases > 1:
        options = given if given is not None else DistributedDataParallelKwargs()
        accelerator.ddp_handler = dataclasses.replace(options, find_unused_parameters=True)
    try:
        yield
    finally:
        accelerator.ddp_handler = given


def _has_root_parameters(model: nn.Module) -> bool:
    """Whether the model itself has parameters, not only its parts."""
    return any("." not in name for name, _ in model.named_parameters())


def _has_persistent_buffers(model: nn.Module) -> bool:
    return bool(model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)})
