"""Finds what is not finite, and reports it in a way that a user can act on.

All of it runs only for a retry. The exception is `non_finite_tensors`, which also runs once when the model is built.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..ranks.collectives import gather_objects

_SHOWN = 5  # names in a report: enough to see the pattern


@dataclass(frozen=True)
class NonFiniteReport:
    """The findings of all ranks when a window's gradient was not finite. The same on every rank."""

    losses: list[list[float]]
    """Losses of the window's micro-batches, by rank."""
    gradients: dict[str, list[int]]
    """The first parameters with a non-finite gradient, by clean name, each with the ranks where this is so."""
    gradient_count: int
    """How many parameters have a non-finite gradient on any rank."""
    parameter_count: int
    """How many parameters have a gradient."""
    parameters: list[str]
    """Trained parameters that are themselves non-finite, on any rank."""
    buffers: list[str]
    """Buffers and frozen parameters that were non-finite before the window, on any rank, but were finite when the model
    was built."""

    @property
    def non_finite_loss_ranks(self) -> list[int]:
        """Ranks where a micro-batch's loss was not finite."""
        return [rank for rank, losses in enumerate(self.losses) if not all(map(math.isfinite, losses))]

    @property
    def advice(self) -> str:
        """A remedy to try."""
        if self.parameters:
            return "Resume from a healthy checkpoint, with a lower learning rate or `grad_clip`."
        if self.buffers:
            return (
                "A buffer or frozen parameter was non-finite before the window. Look at what `forward` writes, as"
                " BatchNorm does."
            )
        if self.non_finite_loss_ranks:
            return "Look at the data of those ranks, and at log, exp and division on the way to the loss."
        return (
            "The loss is finite and its derivative is not: look for sqrt, norm or pow at 0 on the way to those"
            " parameters, or try `torch.autograd.set_detect_anomaly(True)`."
        )

    def __str__(self) -> str:
        lines = [f"losses by rank: {'; '.join(f'{r}: {_numbers(losses)}' for r, losses in enumerate(self.losses))}"]
        ranks = self.non_finite_loss_ranks
        lines.append(f"non-finite loss on ranks {ranks}" if ranks else "every loss is finite")
        shown = ", ".join(f"{name} (ranks {ranks})" for name, ranks in self.gradients.items())
        more = ", …" if self.gradient_count > len(self.gradients) else ""
        lines.append(
            f"non-finite gradients in {self.gradient_count} of {self.parameter_count} parameters: {shown}{more}"
        )
        for kind, names in (("parameters", self.parameters), ("buffers or frozen parameters", self.buffers)):
            if names:
                more = ", …" if len(names) > _SHOWN else ""
                lines.append(f"non-finite {kind}: {', '.join(names[:_SHOWN])}{more}")
        return "; ".join(lines)


@torch.no_grad()
def diagnose(
    model: nn.Module, losses: Sequence[torch.Tensor], non_finite_when_built: Collection[str] = ()
) -> NonFiniteReport:
    """Find what is not finite. Call on every rank, while the window's gradient is still there and after the buffers are
    restored.

    Args:
        model: The model without its wrappers.
        losses: This rank's losses of the window, 0-dim.
        non_finite_when_built: Clean names of buffers and frozen parameters that are non-finite on purpose, as masks.
    """
    named = [(clean_name(name), param) for name, param in model.named_parameters()]
    own = (
        [float(loss) for loss in losses],
        [name for name, p in named if p.grad is not None and not _is_finite(p.grad)],
        non_finite_tensors((name, p) for name, p in named if p.requires_grad),
        [name for name in non_finite_tensors(untrained_tensors(model)) if name not in non_finite_when_built],
    )
    by_rank = gather_objects(own)
    found = [name for name, p in named if any(name in ranks_own[1] for ranks_own in by_rank)]
    return NonFiniteReport(
        losses=[ranks_own[0] for ranks_own in by_rank],
        gradients={name: [r for r, ranks_own in enumerate(by_rank) if name in ranks_own[1]] for name in found[:_SHOWN]},
        gradient_count=len(found),
        parameter_count=sum(p.grad is not None for _, p in named),
        parameters=list(dict.fromkeys(name for ranks_own in by_rank for name in ranks_own[2])),
        buffers=list(dict.fromkeys(name for ranks_own in by_rank for name in ranks_own[3])),
    )


def untrained_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers and frozen parameters, with clean names."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return [(clean_name(name), tensor) for name, tensor in [*model.named_buffers(), *frozen]]


@torch.no_grad()
def non_finite_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of tensors that contain infinities or NaN on this rank. Costs one host read per tensor."""
    return [name for name, tensor in named if not _is_finite(tensor)]


def clean_name(name: str) -> str:
    """A parameter's name without the parts that compilation and activation checkpointing add."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.is_sparse:
        local = local.coalesce().values()
    if not (local.is_floating_point() or local.is_complex()) or local.is_meta:
        return True
    wide = local.float() if local.element_size() == 1 else local  # `isfinite` doesn't support fp8
    return bool(torch.isfinite(wide).all())


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values) or "none"
