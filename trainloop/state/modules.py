"""The state of a model: live memory, entries that modules save in their own way, and buffers that change shape.

Live entries of `state_dict` are parameters and buffers, or views of them. They are read and written in place. An entry
that a module makes for its `state_dict` (an fp16 copy, extra state) is restored by the module's own loading.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.sharding import local_tensor
from ..step.buffers import form_of, memory_of, write_into
from ..step.built import BuiltModel, buffer_form, buffer_slots
from ..step.non_finite import clean_name
from .live import is_extra

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_NUM_TOLD = 5


def extra_state(model: nn.Module) -> dict[str, Any]:
    """By clean name: entries of `state_dict` that are not tensors, and results of the modules' `get_extra_state`."""
    return {clean_name(name): value for name, value in model.state_dict().items() if is_extra(name, value)}


def made_entries(model: nn.Module, tensors: Mapping[str, Any]) -> set[str]:
    """Names of the `state_dict` entries that are not the memory of a parameter or buffer."""
    memory = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return {name for name, tensor in tensors.items() if _storage(tensor) not in memory}


def load_made_entries(model: nn.Module, entries: Mapping[str, Any]) -> None:
    """Load saved entries that are not live memory, including extra state, into the modules that made them.

    Args:
        model: The model without its wrappers.
        entries: By clean name.
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    by_module: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in entries.items():
        owner = name.rpartition(".")[0]
        while owner not in modules:
            owner = owner.rpartition(".")[0]
        by_module[owner][name[len(owner) + 1 :] if owner else name] = value
    for owner, values in by_module.items():
        names = {clean_name(name): name for name in modules[owner].state_dict()}
        state = dict(modules[owner].state_dict())
        state |= {names.get(name, name): value for name, value in values.items()}
        modules[owner].load_state_dict(state)


def check_complete(trainer: BaseTrainer, tensors: Mapping[str, Any]) -> None:
    """Raise if a restart would lose a trained parameter because its module's `state_dict` leaves it out.

    Raises:
        ValueError: It names the parameters.
    """
    saved = {_storage(tensor) for tensor in tensors.values()}
    made = made_entries(trainer.unwrapped_model, tensors) | extra_state(trainer.unwrapped_model).keys()
    owners = {name.rpartition(".")[0] for name in made}
    lost = [
        name
        for name, param in trainer.named_parameters().items()
        if param.requires_grad
        and _storage(param) not in saved
        and not any(f"{name}.".startswith(f"{owner}." if owner else "") for owner in owners)
    ]
    if lost:
        more = f", and {len(lost) - _NUM_TOLD} more" if len(lost) > _NUM_TOLD else ""
        raise ValueError(
            f"The model's `state_dict` leaves out parameters that are trained, so a restart would lose them:"
            f" {', '.join(lost[:_NUM_TOLD])}{more}. Let `state_dict` hold them, or freeze them."
        )


# ---------------------------------------------------------------------- buffers


def changed_forms(trainer: BaseTrainer) -> dict[str, Any]:
    """Persistent buffers whose shape or dtype has changed since the model was built, with the original ones. None: the
    buffer did not exist.
    """
    built = trainer._built_model.buffers
    slots = buffer_slots(trainer.unwrapped_model)
    now = {n: buffer_form(b) for n, (module, key, b) in slots.items() if key not in module._non_persistent_buffers_set}
    return {name: built.get(name) for name in now if built.get(name) != now[name]}


def new_buffers(
    trainer: BaseTrainer, changed: Mapping[str, Any], described: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, torch.Tensor | None]:
    """Memory for the buffers whose shape or dtype had changed in the saved run. None: the buffer had become None.

    Buffers that the code now builds with another shape or dtype are left out: these are not the same buffers.
    """
    built = trainer._built_model.buffers
    modules = {clean_name(name) for name, _ in trainer.unwrapped_model.named_modules()}
    made: dict[str, torch.Tensor | None] = {}
    for name, form in changed.items():
        if built.get(name) == form and name.rpartition(".")[0] in modules:
            shape, dtype = described.get(name, ((), None))
            made[name] = torch.empty(shape, dtype=dtype, device=trainer.device) if dtype is not None else None
    return made


@torch.no_grad()
def place_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor | None], *, is_persistent: bool) -> None:
    """Put saved buffers into the model: into the memory of the existing ones if they fit, else as new buffers."""
    slots = buffer_slots(model)
    modules = {clean_name(name): module for name, module in model.named_modules()}
    for name, saved in buffers.items():
        owner, _, key = name.rpartition(".")
        if name not in slots:
            modules[owner].register_buffer(key, saved, persistent=is_persistent)
            continue
        module, key, present = slots[name]
        if saved is None or present is None or form_of(present) is None or present.shape != saved.shape:
            module._buffers[key] = saved
        elif present is not saved:
            write_into(present, saved)


def rank_buffers(trainer: BaseTrainer) -> dict[str, Any]:
    """This rank's own buffers. BatchNorm's statistics come from the rank's data, and nothing makes them equal under
    FSDP2. In a single process, only the buffers that are not persistent: the others are among the model's tensors.
    """
    slots = buffer_slots(trainer.unwrapped_model)
    is_alone = trainer.accelerator.num_processes == 1
    values = {
        name: buffer.detach()
        for name, (module, key, buffer) in slots.items()
        if buffer is not None and not (is_alone and key not in module._non_persistent_buffers_set)
    }
    return {"buffers": values, "built_sums": trainer._built_model.sums}


@torch.no_grad()
def load_rank_buffers(trainer: BaseTrainer, saved: Mapping[str, Any], seed: int) -> None:
    """The inverse of `rank_buffers`.

    A buffer that is not persistent belongs to the code. If the code now builds it with other values, it keeps the new
    ones, unless another seed may be the reason.

    Args:
        trainer: The trainer, with the seed that it was built with.
        saved: The result of `rank_buffers`.
        seed: The seed that the saved run was built with.
    """
    model, built = trainer.unwrapped_model, trainer._built_model
    slots = buffer_slots(model)
    modules = {clean_name(name) for name, _ in model.named_modules()}
    old_sums = saved.get("built_sums", built.sums)  # saved since version 2 of the format
    ours: dict[bool, dict[str, torch.Tensor | None]] = {True: {}, False: {}}
    differing, kept, gone = [], [], []
    for name, value in saved["buffers"].items():
        is_persistent = name in slots and slots[name][1] not in slots[name][0]._non_persistent_buffers_set
        if name not in slots and (name in old_sums or name.rpartition(".")[0] not in modules):
            gone.append(name)
            continue
        if not is_persistent and old_sums.get(name) != built.sums.get(name):
            if seed == trainer.seed:
                kept.append(name)
                continue
            differing.append(name)
        ours[is_persistent][name] = value.to(trainer.device)
    for is_persistent, buffers in ours.items():
        place_buffers(model, buffers, is_persistent=is_persistent)
    for names, what in (
        (kept, "are built with other values than in the saved run, and keep the new values"),
        (gone, "are no longer in the model"),
        (differing, "are built with other values, because the seed is another, and get the saved values"),
    ):
        if names:
            more = ", …" if len(names) > _NUM_TOLD else ""
            trainer.logger.warning(f"Non-persistent buffers {what}: {', '.join(sorted(names)[:_NUM_TOLD])}{more}.")


def finite_names(trainer: BaseTrainer) -> tuple[set[str], set[str]]:
    """The names of parameters, and of buffers, that must be finite in a healthy run.

    Infinities that the code has built, as in masks, are left out. In a buffer that was registered later only NaN
    counts, because its infinities may be intended.
    """
    built: BuiltModel = trainer._built_model
    params = trainer.named_parameters().keys() - built.non_finite
    buffers = set()
    for name, (_, _, buffer) in buffer_slots(trainer.unwrapped_model).items():
        if buffer is None or not buffer.is_floating_point() or name in built.non_finite:
            continue
        wide = buffer.float() if buffer.element_size() == 1 else buffer  # `isnan` doesn't support fp8
        if built.buffers.get(name) is not None or bool(torch.isnan(memory_of(wide)).any()):
            buffers.add(name)
    return params, buffers


def shares_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, or this rank's shards of them, share memory."""
    return _storage(tensor) == _storage(other)


def _storage(tensor: torch.Tensor) -> int:
    """Identifies the memory of a tensor, or of this rank's shard, which may be empty and have no address."""
    local = local_tensor(tensor)
    return local.untyped_storage()._cdata if local.layout is torch.strided else id(tensor)
