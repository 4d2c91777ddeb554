"""Frozen modules beside the model, such as a VAE or a text encoder: prepares those of `build_frozen` for `forward`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import describe
from ..ranks import collectives

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_frozen(trainer: BaseTrainer) -> nn.Module | dict[str, nn.Module] | None:
    """Call the trainer's `build_frozen` and prepare the modules: frozen, in eval mode, the same on every rank, on the
    device, in the launch's precision, and sharded if `shard_frozen` is set. Call on every rank.

    Raises:
        TypeError: `build_frozen` returned something else.
    """
    returned: Any = trainer.build_frozen()
    modules = dict(returned) if isinstance(returned, Mapping) else {} if returned is None else {"": returned}
    for name, module in modules.items():
        if not isinstance(name, str) or not isinstance(module, nn.Module):
            raise TypeError(
                f"`build_frozen` must return a module, a mapping from names to modules, or None, but returned"
                f" {describe(returned)}{f', with {describe(module)} in it' if isinstance(returned, Mapping) else ''}."
            )
        _prepare(trainer, name, module)
    return returned if isinstance(returned, nn.Module) else modules or None


def check_frozen(model: nn.Module, frozen: nn.Module | dict[str, nn.Module] | None) -> None:
    """Check that the model shares no parameters with the frozen modules. They would be frozen in the model too.

    Raises:
        ValueError: It shares some.
    """
    modules = frozen.values() if isinstance(frozen, dict) else [] if frozen is None else [frozen]
    held = {param for module in modules for param in module.parameters()}
    if shared := [name for name, param in model.named_parameters() if param in held]:
        raise ValueError(
            f"`build_model` returned a model that shares {len(shared)} parameters with `build_frozen`'s modules (first:"
            f" {shared[0]}). Copy the part with `copy.deepcopy`, or leave it to one of the two."
        )


def _prepare(trainer: BaseTrainer, name: str, module: nn.Module) -> None:
    accelerator = trainer.accelerator
    if on_meta := [key for key, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]:
        raise ValueError(
            f"`build_frozen` must return modules with values, but {len(on_meta)} tensors of {name or 'its module'} are"
            f" on the meta device (first: {on_meta[0]}). Load its weights, as `from_pretrained` does."
        )
    module.eval().requires_grad_(False)
    collectives.share_rank_zero_weights(module, accelerator.device)
    given = trainer.frozen_dtype
    dtype = given.get(name) if isinstance(given, Mapping) else given
    dtype = dtype if dtype is not None else _DTYPES.get(accelerator.mixed_precision)
    if dtype is not None:
        module.to(dtype)  # floating-point parameters and buffers
    if trainer.shard_frozen and accelerator.is_fsdp2:
        _shard(module, accelerator.device)
    else:
        module.to(accelerator.device)


def _shard(module: nn.Module, device: torch.device) -> None:
    """Shard a module over all ranks. Each block of a list is gathered by itself and freed after its forward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for block in [block for part in reversed(lists) for block in part if next(block.parameters(), None) is not None]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for buffer_name, buffer in list(module.named_buffers()):
        owner, _, key = buffer_name.rpartition(".")
        module.get_submodule(owner)._buffers[key] = buffer.to(device)
    for method in getattr(module, "forward_methods", ()):
        register_fsdp_forward_method(module, method)
