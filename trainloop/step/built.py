"""What a model's buffers and frozen parameters were when the model was built, before anything was trained or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.format.integrity import sums_of_bytes
from ..ranks import collectives
from .buffers import form_of, memory_of
from .non_finite import clean_name, non_finite_tensors, untrained_tensors


@dataclass(frozen=True)
class BuiltModel:
    """Tells what the code says from what `forward` has made of it. Costs one pass over buffers and frozen parameters.

    Attributes:
        buffers: Shape and dtype of each buffer by clean name; None: it was None.
        sums: Of the bytes of the buffers that are not persistent.
        non_finite: Clean names of buffers and frozen parameters with infinities or NaN. They are meant to be so, as
            masks are, and say nothing about the health of the run.
    """

    buffers: dict[str, Any]
    sums: dict[str, int]
    non_finite: frozenset[str]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> BuiltModel:
        """Look at a model, without its wrappers. Call on every rank."""
        slots = buffer_slots(model)
        volatile = {n: b for n, (module, key, b) in slots.items() if key in module._non_persistent_buffers_set}
        present = {name: memory_of(b) for name, b in volatile.items() if b is not None and form_of(b) is not None}
        non_finite = non_finite_tensors(untrained_tensors(model))  # of shards another rank may hold the infinities
        return cls(
            {name: buffer_form(buffer) for name, (_, _, buffer) in slots.items()},
            dict(zip(present, sums_of_bytes(list(present.values())), strict=True)),
            frozenset(name for names in collectives.gather_objects(non_finite) for name in names),
        )


def buffer_slots(model: nn.Module) -> dict[str, tuple[nn.Module, str, torch.Tensor | None]]:
    """Every place of a buffer by clean name: module, name in it, and the buffer, which may be None."""
    return {
        clean_name(f"{prefix}.{key}" if prefix else key): (module, key, buffer)
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
    }


def buffer_form(buffer: torch.Tensor | None) -> list[Any] | None:
    """Shape and dtype, as they are saved."""
    return None if buffer is None else [list(buffer.shape), str(buffer.dtype).removeprefix("torch.")]
