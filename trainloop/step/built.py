"""The buffers and frozen parameters of a model as it was built, before anything was trained or loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..checkpoint.format.integrity import sums_of_bytes
from ..checkpoint.sharding import local_tensor
from ..ranks import collectives
from .buffers import form_of, memory_of
from .non_finite import clean_name, non_finite_tensors, untrained_tensors


@dataclass(frozen=True)
class BuiltModel:
    """Distinguishes what the code of the model defines from what `forward` has changed.

    Costs one pass over buffers and frozen parameters.

    Attributes:
        buffers: Shape and dtype of each buffer, by clean name. None: the buffer was None.
        sums: Checksums of the buffers that are not persistent.
        non_finite: Clean names of buffers and frozen parameters that contain infinities or NaN on purpose, as masks do.
            They say nothing about the health of the run.
        frozen_sums: Checksums of this rank's part of all parameters, because any may be frozen later. Empty if not
            needed.
        fingerprints: Fingerprints of the frozen parameters as they were built, as far as they have been computed.
    """

    buffers: dict[str, Any]
    sums: dict[str, int]
    non_finite: frozenset[str]
    frozen_sums: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, *, sums_frozen: bool = False) -> BuiltModel:
        """Examine a model, without its wrappers. Call on every rank.

        Args:
            model: The model.
            sums_frozen: Whether to fill `frozen_sums`, which costs a pass over the parameters.
        """
        slots = buffer_slots(model)
        volatile = {n: b for n, (module, key, b) in slots.items() if key in module._non_persistent_buffers_set}
        present = {name: memory_of(b) for name, b in volatile.items() if b is not None and form_of(b) is not None}
        non_finite = non_finite_tensors(untrained_tensors(model))  # infinities may be in another rank's shard only
        return cls(
            {name: buffer_form(buffer) for name, (_, _, buffer) in slots.items()},
            dict(zip(present, sums_of_bytes(list(present.values())), strict=True)),
            frozenset(name for names in collectives.gather_objects(non_finite) for name in names),
            sums_of_held(frozen_entries(model, all_params=True)) if sums_frozen else {},
        )


def frozen_entries(model: nn.Module, *, all_params: bool = False) -> dict[str, torch.Tensor]:
    """The entries of a model's `state_dict` that belong to frozen parameters, by clean name. These are the parameters
    and what a module saves beside one, for example "fc.weight.absmax" of a quantized "fc.weight". With
    `all_params`, the entries of all parameters.
    """
    named = model.named_parameters(remove_duplicate=False)
    frozen = {clean_name(name) for name, param in named if all_params or not param.requires_grad}

    def is_frozen(name: str) -> bool:
        while name and name not in frozen:
            name = name.rpartition(".")[0]
        return bool(name)

    entries = ((clean_name(name), value) for name, value in model.state_dict().items()) if frozen else ()
    return {name: value for name, value in entries if isinstance(value, torch.Tensor) and is_frozen(name)}


def sums_of_held(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """A checksum of this rank's part of each tensor, by name."""
    return dict(zip(tensors, sums_of_bytes([local_tensor(tensor) for tensor in tensors.values()]), strict=True))


def buffer_slots(model: nn.Module) -> dict[str, tuple[nn.Module, str, torch.Tensor | None]]:
    """Every slot of a buffer, by clean name: the module, the name in it, and the buffer, which may be None."""
    return {
        clean_name(f"{prefix}.{key}" if prefix else key): (module, key, buffer)
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
    }


def buffer_form(buffer: torch.Tensor | None) -> list[Any] | None:
    """Shape and dtype of a buffer, in the form that checkpoints save."""
    return None if buffer is None else [list(buffer.shape), str(buffer.dtype).removeprefix("torch.")]
