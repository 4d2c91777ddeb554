"""The state of a run as nested dicts, read from model, optimizer and random generators, and restored to them.

Everything has the model's clean parameter names, so it can be loaded under another strategy and at another number of
processes. Tensors are the live ones: copy them before the next step changes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..step.models import Models
from ..step.non_finite import clean_name

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions


def is_extra(name: str, value: Any) -> bool:
    """Whether an entry of a model's `state_dict` is not a weight: extra state of a module, or not a tensor."""
    return name.rpartition(".")[2] == "_extra_state" or not isinstance(value, torch.Tensor)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of `torch.compile` and DDP. Changes neither."""
    if isinstance(module, Models):
        return module.unwrapped
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def model_state(model: nn.Module, options: StateDictOptions | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a prepared model by clean name; without `options`, the live ones. Call on every rank."""
    if options is None:  # the same as torch's function, whose import takes 0.5 s, and which takes time for each name
        items = unwrap(model).state_dict().items()
        return {clean_name(name): tensor for name, tensor in items if not is_extra(name, tensor)}
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(unwrap(model), options=options)
    return {name: tensor for name, tensor in state.items() if not is_extra(name, tensor)}


def like_param(value: Any, param: torch.Tensor, *, copy: bool = True) -> Any:
    """`value` on the device of `param`, and sharded like it if it has the same shape. Without `copy`, the result may
    share memory with `value`.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "device_mesh") or (value.dim() == 0 and value.device.type == "cpu"):
        return value.detach().clone() if copy else value.detach()  # step counters stay on the CPU on purpose
    value = value.detach().to(param.device, copy=copy)
    if hasattr(param, "device_mesh") and value.shape == param.shape:
        from torch.distributed.tensor import distribute_tensor

        like: Any = param
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def empty_like_param(param: Any, shape: tuple[int, ...], dtype: torch.dtype, *, on_host: bool) -> torch.Tensor:
    """Empty memory for state of a parameter, sharded like it if the shape is the same. None: of no parameter."""
    if param is None or on_host:
        return torch.empty(shape, dtype=dtype)
    if shape == tuple(param.shape):
        return torch.empty_like(param.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=param.device)
