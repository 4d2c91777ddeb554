"""The state of a run as nested dicts: what is read out of model, optimizer and random generators, and put back.

Everything is named by the model's clean parameter names, so that it can be read under another strategy and another
number of processes. Tensors are the live ones: copy them before the next step changes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..step.non_finite import clean_name

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and DDP's wrappers. Changes neither."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def model_state(model: nn.Module, options: StateDictOptions | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a prepared model by clean name; without `options` the live ones. Call on every rank."""
    if options is None:  # as torch's function returns them, which takes half a second to load and more for each name
        return {clean_name(name): tensor for name, tensor in unwrap(model).state_dict().items()}
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of `optimizer` by parameter name.

    torch's `get_optimizer_state_dict` is not used: on a fresh optimizer it takes a hidden step, which changes the
    trajectory of AdamW and others, and a parameter that never had a gradient makes what it saved unloadable.

    Args:
        model: The model without its wrappers.
        optimizer: The optimizer without its wrapper.

    Returns:
        `{"state": {name: {key: value}}, "param_groups": [{"params": [name], ...}]}`
    """
    names: dict[torch.Tensor, str] = {param: clean_name(name) for name, param in model.named_parameters()}
    return {
        "state": {names[param]: dict(state) for param, state in optimizer.state.items()},
        "param_groups": [
            {**group, "params": [names[param] for param in group["params"]]} for group in optimizer.param_groups
        ],
    }


@torch.no_grad()
def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put back what `optimizer_state` read.

    Values keep their dtype (`Optimizer.load_state_dict` casts them to the parameter's). A whole tensor is sharded like
    its parameter.

    Raises:
        ValueError: The groups or names are not those of this optimizer; nothing was changed.
    """
    params = {clean_name(name): param for name, param in model.named_parameters()}
    saved, own = state_dict["param_groups"], optimizer_state(model, optimizer)["param_groups"]
    if len(saved) != len(own):
        raise ValueError(f"The optimizer has {len(own)} parameter groups, but the saved state has {len(saved)}.")
    for i, (saved_group, own_group) in enumerate(zip(saved, own, strict=True)):
        if saved_group["params"] != own_group["params"]:
            difference = sorted(set(saved_group["params"]) ^ set(own_group["params"])) or ["their order"]
            raise ValueError(
                f"Parameter group {i} of the optimizer holds other parameters than the saved one; they differ in:"
                f" {', '.join(difference[:5])}."
            )
    unknown = sorted(set(state_dict["state"]) - set(params))
    if unknown:
        raise ValueError(f"The saved optimizer state has parameters that the model has not: {', '.join(unknown[:5])}.")
    optimizer.state.clear()
    for name, state in state_dict["state"].items():
        param = params[name]
        optimizer.state[param] = {key: like_param(value, param) for key, value in state.items()}
    for saved_group, group in zip(saved, optimizer.param_groups, strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})


def like_param(value: Any, param: torch.Tensor) -> Any:
    """`value` as a tensor of its own, on `param`'s device, and sharded like it if it has its shape."""
    if not isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "device_mesh"):
        return value.detach().clone()
    if value.dim() == 0 and value.device.type == "cpu":
        return value.detach().clone()  # step counters live on the CPU on purpose
    value = value.detach().to(param.device, copy=True)
    if hasattr(param, "device_mesh") and value.shape == param.shape:
        from torch.distributed.tensor import distribute_tensor

        like: Any = param
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def empty_like_param(param: Any, shape: tuple[int, ...], dtype: torch.dtype, *, on_host: bool) -> torch.Tensor:
    """Memory for what belongs to a parameter (None: to none): sharded like it if it has its shape."""
    if param is None or on_host:
        return torch.empty(shape, dtype=dtype)
    if shape == tuple(param.shape):
        return torch.empty_like(param.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=param.device)
