"""Initialises modules that were built on the meta device, with the same bits at any number of processes.

Modules are initialised one after another. A module gets whole tensors on the device, and random numbers that depend on
its name. Then this rank's part is copied into the shards. So a rank holds its shards and at most one whole module.

A module is initialised by its `reset_parameters`, then by the `_init_weights(module)` of the model that contains it, as
in transformers and many other libraries. Anything else that `__init__` does is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..checkpoint.format.boxes import slices
from ..checkpoint.sharding import local_box, local_tensor
from ..rng import derived_seed, load_rng_state, rng_state, seed_all
from ..step.non_finite import clean_name

_NUM_SHOWN = 10


@dataclass(frozen=True)
class Slot:
    """The slot of a parameter or buffer in a module."""

    name: str
    module: nn.Module
    key: str

    @property
    def store(self) -> dict[str, Any]:
        """The module's dict that contains it."""
        return self.module._parameters if self.key in self.module._parameters else self.module._buffers

    @property
    def tensor(self) -> torch.Tensor:
        tensor: torch.Tensor = self.store[self.key]
        return tensor


def slots_of(module: nn.Module, prefix: str = "", *, recurse: bool = True) -> Iterator[Slot]:
    """The slots of parameters and buffers, with clean names. A tied tensor has several."""
    for name, part in module.named_modules(prefix=prefix) if recurse else [(prefix, module)]:
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                yield Slot(clean_name(f"{name}.{key}" if name else key), part, key)


@dataclass(frozen=True)
class Member:
    """A module, and the functions that initialise it."""

    name: str
    module: nn.Module
    functions: list[Callable[[], Any]]


@dataclass(frozen=True)
class Unit:
    """Modules that are initialised together, children first, because one of them may change the others' tensors."""

    members: list[Member]
    slots: list[Slot]
    """The tensors to fill."""
    others: list[Slot] = field(default_factory=list)
    """Tensors inside the unit that are not to be filled, because they have values already. They don't change."""
    outside: list[Slot] = field(default_factory=list)
    """Tensors of submodules that belong to other units. The unit may not write to them."""


def plan_units(model: nn.Module, wanted: Collection[str]) -> tuple[list[Unit], list[str]]:
    """Divide a model into units.

    A module with a `reset_parameters` and its submodules are one unit. So is each entry of a `ModuleList`, such as a
    transformer's layer, in a model with `_init_weights`. Any other module is a unit without its submodules.

    Args:
        model: The model without its wrappers.
        wanted: Clean names of the tensors to fill. Of tied tensors, the first name.

    Returns:
        The units, and the names of tensors that nothing initialises.
    """
    units: list[Unit] = []
    missing: list[str] = []

    def visit(name: str, module: nn.Module, owner: nn.Module | None, *, is_block: bool) -> None:
        owner = module if _has_init_weights(module) else owner
        slots = [slot for slot in slots_of(module, name) if slot.name in wanted]
        if not slots:
            return
        has_parts = any(True for _ in module.children())
        if (_reset_of(module) is not None and has_parts) or (owner is not None and is_block):
            members = list(_members(name, module, owner))
            units.append(Unit(members, slots, [s for s in slots_of(module, name) if s.name not in wanted]))
            return
        for key, child in module.named_children():
            visit(f"{name}.{key}" if name else key, child, owner, is_block=isinstance(module, nn.ModuleList))
        direct = list(slots_of(module, name, recurse=False))
        own = [slot for slot in direct if slot.name in wanted]
        member = _member(name, module, owner)
        if own and not member.functions:
            missing.extend(slot.name for slot in own)
        elif member.functions:
            outside = [slot for slot in slots_of(module, name) if slot.module is not module]
            units.append(Unit([member], own, [slot for slot in direct if slot.name not in wanted], outside))

    visit("", model, None, is_block=False)
    return units, missing


@torch.no_grad()
def initialise(units: list[Unit], seed: int, device: torch.device) -> list[str]:
    """Fill the tensors of units; of a DTensor, this rank's part. No communication.

    Args:
        units: From `plan_units`.
        seed: The run's seed. For each module, the generators are seeded by this and the module's name.
        device: The device for whole modules. Different types of devices draw different numbers.

    Returns:
        Names of tensors that were not initialised, or only partly.
    """
    before = rng_state(device)
    try:
        return [name for unit in units for name in _initialise_unit(unit, seed, device)]
    finally:
        load_rng_state(before, device)


def _initialise_unit(unit: Unit, seed: int, device: torch.device) -> list[str]:
    unfilled = []
    targets = {slot: slot.tensor for slot in unit.slots}
    with _whole(unit, device):
        for member in unit.members:
            _seed(derived_seed(seed, member.name))
            for function in member.functions:
                function()
        for slot, target in targets.items():
            value = slot.tensor
            if _is_blank(value):
                unfilled.append(slot.name)
            local_tensor(target).copy_(value[slices(local_box(target), (0,) * target.dim())])
    return unfilled


def listed(names: Collection[str]) -> str:
    """Names as a part of an error message. If there are many, only the first ones."""
    shown = list(names)[:_NUM_SHOWN]
    return f"{', '.join(shown)}{f' and {len(names) - len(shown)} more' if len(names) > len(shown) else ''}"


# ---------------------------------------------------------------------- what initialises a module


def _members(name: str, module: nn.Module, owner: nn.Module | None) -> Iterator[Member]:
    """A module and its submodules, children first."""
    owner = module if _has_init_weights(module) else owner
    for key, child in module.named_children():
        yield from _members(f"{name}.{key}" if name else key, child, owner)
    member = _member(name, module, owner)
    if member.functions:
        yield member


def _member(name: str, module: nn.Module, owner: nn.Module | None) -> Member:
    functions: list[Callable[[], Any]] = []
    if (reset := _reset_of(module)) is not None:
        functions.append(reset)
    if owner is not None and not _is_wrapper(module):
        init_weights: Any = owner._init_weights
        functions.append(lambda: init_weights(module))
    return Member(clean_name(f"{name}.").rstrip("."), module, functions)


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """The module's own `reset_parameters`, not that of a module that it wraps."""
    for name in ("reset_parameters", "_reset_parameters"):  # MultiheadAttention has the second
        if hasattr(type(module), name) or name in vars(module):
            reset: Callable[[], Any] = getattr(module, name)
            return reset
    return None


def _has_init_weights(module: nn.Module) -> bool:
    return callable(getattr(type(module), "_init_weights", None))


def _is_wrapper(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or "_checkpoint_wrapped_module" in module._modules


# ---------------------------------------------------------------------- whole tensors for a while


@contextmanager
def _whole(unit: Unit, device: torch.device) -> Iterator[None]:
    """Inside this context, a unit's modules have whole tensors on the device, filled with `_blank`."""
    before = {slot: (slot.store, slot.tensor) for slot in [*unit.slots, *unit.others, *unit.outside]}
    made: dict[int, torch.Tensor] = {}  # by id, because a tied tensor has several slots
    for slot in [*unit.slots, *unit.others]:
        made.setdefault(id(slot.tensor), _like(slot.tensor, device))
    for slot in unit.outside:
        made.setdefault(id(slot.tensor), _like(slot.tensor, torch.device("meta")))
    outside = {made[id(slot.tensor)].untyped_storage()._cdata: slot.name for slot in unit.outside}
    try:
        for slot, (store, tensor) in before.items():
            store[slot.key] = made[id(tensor)]
        with _NoWrites(outside, unit.members[-1].name):
            yield
    finally:
        for slot, (store, tensor) in before.items():
            store[slot.key] = tensor


def _like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A whole tensor of the same shape and dtype, filled with `_blank`."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if not whole.is_meta:
        whole.fill_(_blank(tensor.dtype))
    return nn.Parameter(whole, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


def _blank(dtype: torch.dtype) -> Any:
    """The value that marks an element as not initialised."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min


def _is_blank(tensor: torch.Tensor) -> bool:
    """Whether a tensor was not initialised. With floating-point numbers, also if only a part was not."""
    if tensor.is_floating_point() or tensor.is_complex():
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # `isnan` doesn't support fp8
        return bool(torch.isnan(wide).any())
    return tensor._version <= 1 and bool((tensor == _blank(tensor.dtype)).all())


class _NoWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises if a module's initialisation writes to tensors of other units."""

    def __init__(self, names: dict[int, str], module: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._module = names, module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            name = self._names.get(args[0].untyped_storage()._cdata)
            if name is not None:
                raise ValueError(
                    f"`_init_weights({self._module or 'the model'})` changes {name}, which is another module's. A model"
                    " on the meta device is initialised module by module. Build it on the CPU, or return a"
                    " folder of weights from `initial_weights`."
                )
        return func(*args, **(kwargs or {}))


def _seed(seed: int) -> None:
    """Seed all generators of this process, including those of devices."""
    seed_all(seed)
    torch.manual_seed(seed)
