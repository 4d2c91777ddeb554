"""Makes DDP share the buffers of rank 0 only once a micro-batch."""

from __future__ import annotations

from torch import nn

from .gradient_checks import ddp_modules


class SharedBuffers:
    """Lets DDP share buffers only before the first forward pass of a micro-batch.

    By default DDP does so before each forward pass, which changes BatchNorm's statistics between two of them. A
    backward pass through both, as in a discriminator, then fails: "modified by an inplace operation".

    Args:
        model: The prepared model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ddps = [ddp for ddp in ddp_modules(model) if ddp.broadcast_buffers]
        for ddp in self._ddps:
            ddp.register_forward_hook(_share_no_more)

    def begin(self) -> None:
        """Call this when a micro-batch begins."""
        for ddp in self._ddps:
            ddp.broadcast_buffers = True


def _share_no_more(ddp: nn.Module, args: object, output: object) -> None:
    ddp.broadcast_buffers = False  # type: ignore[assignment]
