"""What a discarded window leaves behind: nothing in the model, and a report that one can act on.

Everything here but `BufferKeeper.remember` runs on the retry path only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..ranks.collectives import gather_objects

_SHOWN = 5  # names in a report: enough to see the pattern


class BufferKeeper:
    """Keeps a model's buffers as they were before a window, to put them back if the window is discarded.

    Costs one copy of the buffers a step. Which of them `forward` changes can't be told more cheaply: BatchNorm updates
    its statistics without counting up the tensor's version.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [(module._buffers, key) for module in model.modules() for key in module._buffers]
        self._seen: list[torch.Tensor | None] = []
        self._values: list[torch.Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Take note of every buffer's present value."""
        if not self._slots:
            return
        present = [buffers[key] for buffers, key in self._slots]
        live = [buffer for buffer in present if buffer is not None]
        if [_form(buffer) for buffer in live] == [_form(value) for value in self._values]:
            torch._foreach_copy_(self._values, live)
        else:
            self._values = [buffer.detach().clone() for buffer in live]
        self._seen = present

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `remember` saw, also where `forward` has put another tensor in a buffer's place."""
        live = [buffer for buffer in self._seen if buffer is not None]
        if live:
            torch._foreach_copy_(live, self._values)
        for (buffers, key), buffer in zip(self._slots, self._seen, strict=True):
            buffers[key] = buffer

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it, whatever happens to the buffers is undone at the end."""
        self.remember()
        try:
            yield
        finally:
            self.restore()


@dataclass(frozen=True)
class NonFiniteReport:
    """What the ranks found when a window's gradient was not finite; the same on every rank."""

    losses: list[list[float]]
    """Losses of the window's micro-batches, by rank."""
    gradients: dict[str, list[int]]
    """The first parameters with a non-finite gradient, by clean name, with the ranks where it is so."""
    gradient_count: int
    """How many parameters have a non-finite gradient on any rank."""
    parameter_count: int
    """How many parameters have a gradient."""
    parameters: list[str]
    """Parameters that are themselves non-finite, on any rank."""
    buffers: list[str]
    """Buffers that were non-finite before the window, on any rank."""

    @property
    def non_finite_loss_ranks(self) -> list[int]:
        """Ranks where a micro-batch's loss was not finite."""
        return [rank for rank, losses in enumerate(self.losses) if not all(map(math.isfinite, losses))]

    @property
    def advice(self) -> str:
        """What to try."""
        if self.parameters:
            return "Resume from a healthy checkpoint, with a lower learning rate or `grad_clip`."
        if self.buffers:
            return "A buffer was non-finite before the window: look at what `forward` writes, BatchNorm included."
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
        for kind, names in (("parameters", self.parameters), ("buffers", self.buffers)):
            if names:
                more = ", …" if len(names) > _SHOWN else ""
                lines.append(f"non-finite {kind}: {', '.join(names[:_SHOWN])}{more}")
        return "; ".join(lines)


@torch.no_grad()
def diagnose(model: nn.Module, losses: Sequence[torch.Tensor]) -> NonFiniteReport:
    """Find out what is not finite, while the window's gradient is still there and the buffers are put back.

    Call on every rank.

    Args:
        model: The model without its wrappers.
        losses: This rank's losses of the window, 0-dim.
    """
    named = [(clean_name(name), param) for name, param in model.named_parameters()]
    own = (
        [float(loss) for loss in losses],
        [name for name, p in named if p.grad is not None and not _is_finite(p.grad)],
        [name for name, p in named if not _is_finite(p)],
        [clean_name(name) for name, b in model.named_buffers() if not _is_finite(b)],
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


def clean_name(name: str) -> str:
    """A parameter's name without what compilation and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.is_sparse:
        local = local.coalesce().values()
    return bool(torch.isfinite(local).all()) if local.is_floating_point() or local.is_complex() else True


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values) or "none"
