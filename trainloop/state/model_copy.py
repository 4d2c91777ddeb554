"""A copy of a model that computes with its own weights, or an error if that is impossible.

`copy.deepcopy` does not copy functions. A `forward` that was replaced on the instance, or a hook, may hold the original
model in its closure. The copy would then compute with the original's weights. The same is true for cached tensors.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..step.buffers import form_of, write_into
from ..step.non_finite import clean_name

_CONTAINERS = (list, tuple, set, frozenset)
_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)


class CopyError(RuntimeError):
    """The reason why a model cannot be copied, as a part of a sentence."""


class ModelCopy:
    """A copy of a model in eval mode, without gradients.

    Args:
        model: The model without its wrappers. Its weights must be whole.
        constants: From `loose_tensors`, before the model was first used.

    Raises:
        CopyError: The copy would not compute with its own weights.
    """

    def __init__(self, model: nn.Module, constants: Mapping[str, torch.Tensor]) -> None:
        made = [name for name, tensor in loose_tensors(model).items() if constants.get(name) is not tensor]
        if made:
            raise CopyError(f"`forward` keeps tensors that it has made, and they may be of the weights ({made[0]})")
        try:
            self.module = copy.deepcopy(model).eval().requires_grad_(False)
        except Exception as ex:
            raise CopyError(f"`copy.deepcopy` of it fails ({type(ex).__name__}: {ex})") from ex
        if (path := _path_to(self.module, model)) is not None:
            raise CopyError(f"{path} still refers to the model that is trained")
        self._model = model
        self._before = [(module, dict(vars(module))) for module in self.module.modules()]
        self._constants = loose_tensors(self.module)

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy weights by clean name, and the model's current buffers, into the copy. Drop what its `forward` cached.

        Raises:
            CopyError: Something cached can't be dropped.
        """
        for module, before in self._before:
            vars(module).clear()
            vars(module).update(before)
        kept = [name for name, tensor in loose_tensors(self.module).items() if self._constants.get(name) is not tensor]
        if kept:
            raise CopyError(f"`forward` of the copy has kept tensors of its earlier weights ({kept[0]})")
        for name, param in self.module.named_parameters():
            if (weight := weights.get(clean_name(name))) is not None:
                param.copy_(weight)
        for own, live in zip(self.module.modules(), self._model.modules(), strict=True):
            for key in own._buffers.keys() - live._buffers.keys():
                del own._buffers[key]
            for key, buffer in live._buffers.items():
                present = own._buffers.get(key)
                if buffer is None or present is None or form_of(present) is None or form_of(present) != form_of(buffer):
                    own._buffers[key] = None if buffer is None else buffer.detach().clone()
                else:
                    write_into(present, buffer)


def loose_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors in plain attributes of modules, by name. They are neither parameters nor buffers."""
    return {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in ("_parameters", "_buffers", "_modules")
        for key, tensor in _tensors_in(value, attribute, 3)
    }


def _tensors_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}[{key!r}]", depth - 1)
    elif depth and isinstance(value, _CONTAINERS):
        for i, item in enumerate(value):
            yield from _tensors_in(item, f"{path}[{i}]", depth - 1)


def _path_to(copied: nn.Module, model: nn.Module) -> str | None:
    """The place where the copy can reach a part of the original. None: nowhere."""
    parts = {id(module) for module in model.modules()}
    memory = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    seen: set[int] = set()
    waiting: list[tuple[Any, str]] = [(module, name or "the model") for name, module in copied.named_modules()]
    while waiting:
        value, path = waiting.pop()
        if id(value) in seen or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        if id(value) in parts:
            return path
        if isinstance(value, torch.Tensor):
            if value.numel() and value.untyped_storage().data_ptr() in memory:
                return path
            continue
        waiting.extend(_referents(value, path))
    return None


def _referents(value: Any, path: str) -> Iterator[tuple[Any, str]]:
    if isinstance(value, nn.Module):
        for key, item in vars(value).items():
            # A hook that only observes, for a logger that knows the model, must not prevent a copy.
            yield from ((one, f"{path}.{key}") for one in (_bare_hooks(item) if key.endswith("_hooks") else [item]))
    elif isinstance(value, Mapping):
        yield from ((item, path) for item in value.values())
    elif isinstance(value, _CONTAINERS):
        yield from ((item, path) for item in value)
    elif isinstance(value, functools.partial):
        yield from ((item, path) for item in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield from ((item, path) for item in (value.__self__, value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from ((item, path) for item in _captured(value))
    elif not isinstance(value, torch.device | torch.dtype | torch.Size) and hasattr(value, "__dict__"):
        yield from ((item, path) for item in vars(value).values())


def _captured(function: types.FunctionType) -> Iterator[Any]:
    """Everything that a function can reach: its closure, defaults, attributes, and the globals that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    for name in function.__code__.co_names:
        if isinstance(found := function.__globals__.get(name), nn.Module | torch.Tensor):
            yield found


def _bare_hooks(hooks: Any) -> Iterator[Any]:
    """The modules and tensors that the closures of hooks hold directly."""
    for hook in hooks.values() if isinstance(hooks, Mapping) else ():
        if isinstance(hook, types.FunctionType):
            yield from (item for item in _captured(hook) if isinstance(item, nn.Module | torch.Tensor))
