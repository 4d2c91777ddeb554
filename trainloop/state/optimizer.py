"""The state of an optimizer by parameter name: reads and restores it.

An optimizer may have more state than torch's own: an inner optimizer, a counter, keys that are not parameters. If it
has its own `state_dict` or `load_state_dict`, these are used. `__setstate__` is called as in torch's loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..checkpoint.content import is_dtensor
from ..step.non_finite import clean_name
from ..step.optimizers import Optimizers, optimizers_of
from .live import like_param

_METHODS = ("state_dict", "load_state_dict")
_STANDARD = {"state", "param_groups"}


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of `optimizer` by parameter name. Several optimizers share one state, with their groups one after
    another. This works because no parameter belongs to two optimizers.

    torch's `get_optimizer_state_dict` is not used. On a fresh optimizer it takes a hidden step, which changes the
    trajectory of AdamW and others. And if a parameter never had a gradient, its result can't be loaded.

    Args:
        model: The model without its wrappers.
        optimizer: The optimizer without its wrapper.

    Returns:
        `{"state": {name: {key: value}}, "param_groups": [{"params": [name], ...}], "other": ..., "own": ...}`. "other"
        has the entries of `optimizer.state` whose keys are not parameters. "own" has the other entries of the
        optimizer's own `state_dict`. With several optimizers, "other" and "own" are by optimizer name, without empty
        ones, and there is `"optimizers": {name: number of groups}`.

    Raises:
        TypeError: The optimizer keeps state that no `state_dict` shows.
        ValueError: It has state for a tensor that is not a parameter of the model.
    """
    if not isinstance(optimizer, Optimizers):
        return _state_of(model, optimizer)
    parts = {name: _state_of(model, part) for name, part in optimizer.by_name.items()}
    return {
        "state": {param: values for part in parts.values() for param, values in part["state"].items()},
        "param_groups": [group for part in parts.values() for group in part["param_groups"]],
        "other": {name: part["other"] for name, part in parts.items() if part["other"]},
        "own": {name: part["own"] for name, part in parts.items() if part["own"]},
        "optimizers": {name: len(part["param_groups"]) for name, part in parts.items()},
    }


def _state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    names: dict[torch.Tensor, str] = {param: clean_name(name) for name, param in model.named_parameters()}
    own: dict[str, Any] = {}
    if _has_own_state_dict(optimizer):
        own = dict(optimizer.state_dict())
        order = [names[param] for group in optimizer.param_groups for param in group["params"]]
        if _is_standard(own, len(order)):
            keys, groups = own.pop("state"), own.pop("param_groups")
            named = {(order[key] if _is_index(key, len(order)) else _Other(key)): value for key, value in keys.items()}
            groups = [{**group, "params": [order[i] for i in group["params"]]} for group in groups]
        else:
            named, groups = {}, [{"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    else:
        _check_inner(optimizer)
        if any(isinstance(key, torch.Tensor) and key not in names for key in optimizer.state):
            raise ValueError(
                f"{type(optimizer).__name__} has state of a tensor that is not a parameter of the model. If a parameter"
                " was replaced after the optimizer was built, change its values in place instead."
            )
        items = optimizer.state.items()
        named = {(names[key] if isinstance(key, torch.Tensor) else _Other(key)): value for key, value in items}
        groups = [{**group, "params": [names[param] for param in group["params"]]} for group in optimizer.param_groups]
    return {
        "state": {name: dict(value) for name, value in named.items() if isinstance(name, str)},
        "param_groups": groups,
        "other": {name.key: value for name, value in named.items() if isinstance(name, _Other)},
        "own": own,
    }


@torch.no_grad()
def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any], *, copy: bool = True
) -> None:
    """Restore what `optimizer_state` returned.

    Values keep their dtype (`Optimizer.load_state_dict` would cast them to that of the parameter). A whole tensor is
    sharded like its parameter.

    Args:
        model: The model without its wrappers.
        optimizer: The optimizer without its wrapper.
        state_dict: As `optimizer_state` returned it.
        copy: False: the optimizer uses these tensors themselves, and later updates them in place.

    Raises:
        ValueError: The groups or names belong to another optimizer; nothing was changed.
    """
    sizes = {name: len(part.param_groups) for name, part in optimizers_of(optimizer).items()}
    saved_sizes = state_dict.get("optimizers", sizes if isinstance(optimizer, Optimizers) else {"": sizes.get("")})
    if list(saved_sizes) != list(sizes):
        raise ValueError(
            f"The saved state is of {_told(saved_sizes)}, but `build_optimizer` gives {_told(sizes)}. Return the same"
            ' ones in the same order, or let the script\'s begin anew: `CheckpointingHook(on_resume=["optimizer"])`.'
        )
    if not isinstance(optimizer, Optimizers):
        _load_one(model, optimizer, state_dict, copy)
        return
    start = 0
    for name, part in optimizer.by_name.items():
        groups = state_dict["param_groups"][start : (start := start + saved_sizes[name])]
        params = {param for group in groups for param in group["params"]}
        own = {
            "state": {param: values for param, values in state_dict["state"].items() if param in params},
            "param_groups": groups,
            "other": state_dict.get("other", {}).get(name, {}),
            "own": state_dict.get("own", {}).get(name, {}),
        }
        _load_one(model, part, own, copy)


def _told(sizes: Mapping[str, Any]) -> str:
    return "a single optimizer" if "" in sizes else f"the optimizers {', '.join(sizes)}"


def _load_one(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any], copy: bool) -> None:
    params = {clean_name(name): param for name, param in model.named_parameters()}
    saved, present = state_dict["param_groups"], optimizer_state(model, optimizer)
    _check_groups(saved, present["param_groups"])
    unknown = sorted(set(state_dict["state"]) - set(params))
    if unknown:
        raise ValueError(f"The saved optimizer state has parameters that the model has not: {', '.join(unknown[:5])}.")
    state: dict[Any, Any] = {
        params[name]: {key: like_param(value, params[name], copy=copy) for key, value in values.items()}
        for name, values in state_dict["state"].items()
    }
    other, own = state_dict.get("other", {}), state_dict.get("own", {})
    if _has_own_state_dict(optimizer):
        device = next(iter(params.values())).device
        _load_by_itself(optimizer, state, other, _placed(own, present["own"], device), saved)
        return
    optimizer.state.clear()
    optimizer.state.update(state)
    optimizer.state.update(other)
    for saved_group, group in zip(saved, optimizer.param_groups, strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})
    if type(optimizer).__setstate__ is not Optimizer.__setstate__:  # it may complete the state of an earlier version
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def check_unsharded(optimizer: Optimizer, own: Any) -> None:
    """Raise if an optimizer's own `state_dict` contains a sharded tensor whose place only the optimizer understands.

    Raises:
        TypeError: It names the place.
    """
    for path, value in _leaves(own, ()):
        if isinstance(value, torch.Tensor) and is_dtensor(value):
            raise TypeError(
                f"`state_dict` of {type(optimizer).__name__} has a tensor at {'/'.join(map(str, path))} that FSDP2 has"
                ' sharded. It can be saved only if it stands in "state" under the number of its parameter, as torch\'s'
                " own optimizers have it. Train with DDP, or change `state_dict` and `load_state_dict`."
            )


# ---------------------------------------------------------------------- parts


class _Other:
    """A key of `optimizer.state` that is not a parameter."""

    def __init__(self, key: Any) -> None:
        self.key = key


def _load_by_itself(
    optimizer: Optimizer, state: dict[Any, Any], other: dict[Any, Any], own: dict[str, Any], groups: list[Any]
) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    packed: dict[str, Any] = dict(own)
    if not _STANDARD & own.keys():
        numbers = iter(range(len(params)))
        packed["param_groups"] = [{**g, "params": [next(numbers) for _ in g["params"]]} for g in groups]
        packed["state"] = {i: state[param] for i, param in enumerate(params) if param in state} | other
    optimizer.load_state_dict(packed)
    for param, values in state.items():
        live = optimizer.state.get(param, {})
        for key, value in values.items():
            placed = live.get(key) if isinstance(live, Mapping) else None
            if isinstance(value, torch.Tensor) and isinstance(placed, torch.Tensor) and placed.dtype != value.dtype:
                live[key] = value  # torch has cast the live value to the parameter's dtype


def _check_groups(saved: list[Any], own: list[Any]) -> None:
    if len(saved) != len(own):
        raise ValueError(f"The optimizer has {len(own)} parameter groups, but the saved state has {len(saved)}.")
    for i, (saved_group, own_group) in enumerate(zip(saved, own, strict=True)):
        if saved_group["params"] != own_group["params"]:
            difference = sorted(set(saved_group["params"]) ^ set(own_group["params"])) or ["their order"]
            raise ValueError(
                f"Parameter group {i} of the optimizer holds other parameters than the saved one; they differ in:"
                f" {', '.join(difference[:5])}."
            )


def _has_own_state_dict(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    hooks = [f"_optimizer_{method}_{when}_hooks" for method in _METHODS for when in ("pre", "post")]
    return (
        kind.state_dict is not Optimizer.state_dict
        or kind.load_state_dict is not Optimizer.load_state_dict
        or any(getattr(optimizer, name, None) for name in hooks)
    )


def _check_inner(optimizer: Optimizer) -> None:
    for name, value in vars(optimizer).items():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, Optimizer) and one.state is not optimizer.state for one in inner):
            raise TypeError(
                f"{type(optimizer).__name__} keeps another optimizer in `{name}`, whose state its `state_dict` does not"
                " show: a restart would lose it. Define `state_dict` and `load_state_dict` such that they hold it."
            )


def _is_standard(saved: Mapping[str, Any], num_params: int) -> bool:
    """Whether it contains state and groups in the form of torch's own `state_dict`, by parameter number."""
    state, groups = saved.get("state"), saved.get("param_groups")
    return (
        isinstance(state, Mapping)
        and all(isinstance(value, Mapping) for key, value in state.items() if _is_index(key, num_params))
        and isinstance(groups, list)
        and [i for group in groups for i in group.get("params", ())] == list(range(num_params))
    )


def _is_index(key: Any, num_params: int) -> bool:
    return type(key) is int and 0 <= key < num_params


def _placed(saved: Any, live: Any, device: torch.device) -> Any:
    """Saved state, with each tensor on the device of the live one."""
    if isinstance(saved, torch.Tensor):
        if isinstance(live, torch.Tensor):
            return saved.to(live.device)
        return saved.to(device) if saved.dim() else saved
    if type(saved) is dict:
        inner = live if isinstance(live, Mapping) else {}
        return {key: _placed(value, inner.get(key), device) for key, value in saved.items()}
    if type(saved) in (list, tuple):
        same = isinstance(live, list | tuple) and len(live) == len(saved)
        return type(saved)(_placed(value, live[i] if same else None, device) for i, value in enumerate(saved))
    return saved


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))
    else:
        yield path, value
