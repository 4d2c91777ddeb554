"""The update of a step: clipping, the optimizer's step, and the one device-to-host read.

read first   norm ─► the host reads it ─► clip ─► hooks ─► optimizer step     the device waits for the host
read last    norm ─► clip ─► optimizer step ─► the host reads the norm        the device works in the meantime

Both give the same bits. Reading last needs an optimizer that skips its step on the device if the norm is not finite.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.optim import optimizer as torch_optimizer

from ..hook import overrides
from .agreement import Agreement
from .gradients import Gradients
from .optimizers import optimizers_of

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

DEVICES = {"cuda"}
"""Types of devices on which the host reads last. On the CPU reading costs no wait, and clipping before the host has
decided costs a multiplication that is often not needed."""


class Update:
    """Applies the gradients of a trainer's windows, one after another.

    Args:
        trainer: The trainer. It must be built.
        gradients: The gradients of the optimizer's parameters.
        agreement: It records the norm for the checksum.
        optimizer: The raw optimizer of the step or of a phase.
    """

    def __init__(
        self, trainer: BaseTrainer, gradients: Gradients, agreement: Agreement, optimizer: torch.optim.Optimizer
    ) -> None:
        self._trainer, self._gradients, self._agreement = trainer, gradients, agreement
        self._optimizer = optimizer
        self._parts: list[Any] = list(optimizers_of(self._optimizer).values())
        self._scaler = trainer.grad_scaler
        self._is_queued = False
        self._pinned: torch.Tensor | None = None  # host memory for the norm
        self._stream: Any = None
        self._event: Any = None
        # These hooks may look at the gradient before the update, so it must be known to be finite then.
        calls_hooks = any(overrides(hook, "on_before_optimizer_step") for hook in trainer.hooks)
        self.reads_last = not calls_hooks and gradients.can_clip_unread and all(map(skips_on_device, self._parts))
        """Whether the update is queued before the host reads the norm."""

    def start(self, norm: torch.Tensor) -> float:
        """Clip the gradient and read its norm, in the step's one device-to-host sync. If the norm is not finite, the
        gradient is unchanged.

        Args:
            norm: Norm of the gradient, from `Gradients.norm`.

        Returns:
            The norm, the same on every rank.
        """
        readable = self._agreement.readable(norm)
        window = self._trainer._window
        if not self.reads_last:
            window.look_ahead()
            value = self._agreement.read_norm(readable)
            if math.isfinite(value):
                self._gradients.clip(norm, value)
            return value
        reading = self._start_reading(readable)
        self._gradients.clip_unread(norm)
        nums_with_state = [len(part.state) for part in self._parts]
        was_updating, window.is_updating = window.is_updating, True
        self._step_if_finite(norm)
        window.look_ahead()
        value = self._agreement.read_norm(reading())
        self._is_queued = math.isfinite(value)
        if not self._is_queued:
            window.is_updating = was_updating
            for part, num in zip(self._parts, nums_with_state, strict=True):
                for param in list(part.state)[num:]:  # skipped, SGD leaves its new momentum uninitialised
                    del part.state[param]
        return value

    def finish(self) -> None:
        """Apply the gradient, unless `start` has already queued the update."""
        self._trainer._window.is_updating = True
        if not self._is_queued:
            self._step()
        self._is_queued = False
        if self._scaler is not None:
            self._scaler.update()

    def _step_if_finite(self, norm: torch.Tensor) -> None:
        """Queue the optimizer's step. The device skips it, including its counters, if `norm` is not finite."""
        # Passed in the same way as by `torch.amp.GradScaler.step`. NaN != 0, and inf * 0 is NaN too.
        found_inf = (norm * 0.0).ne_(0.0).float()
        for part in self._parts:
            part.found_inf, part.grad_scale = found_inf, None
        try:
            self._step()
        finally:
            for part in self._parts:
                del part.found_inf, part.grad_scale

    def _step(self) -> None:
        rates = [group.get("lr", math.nan) for group in self._optimizer.param_groups]
        # A schedule changes a rate in place if the rate is a tensor.
        self._trainer.step_info.lr = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]
        self._optimizer.step()

    def _start_reading(self, readable: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start a copy to the host.

        Returns:
            A function that waits for this copy only, not for work queued later, and returns the copy.
        """
        if not readable.is_cuda:
            return lambda: readable
        pinned = self._pinned
        if pinned is None or pinned.dtype != readable.dtype:
            pinned = self._pinned = torch.empty(readable.shape, dtype=readable.dtype, pin_memory=True)
            self._stream = torch.cuda.Stream(readable.device)  # type: ignore[no-untyped-call]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # On a separate stream: between two kernels of the compute stream, a copy would leave the device idle.
        self._stream.wait_stream(torch.cuda.current_stream(readable.device))
        with torch.cuda.stream(self._stream):
            pinned.copy_(readable, non_blocking=True)
            self._event.record()

        def wait() -> torch.Tensor:
            self._event.synchronize()
            return pinned

        return wait


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step is exactly torch's own fused step, which respects `found_inf`."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if {param.device.type for param in params} - DEVICES or len({param.device for param in params}) != 1:
        return False
    step: Any = optimizer.step
    if inspect.unwrap(step) not in {inspect.unwrap(cls.step) for cls in (Adam, AdamW, SGD, Adagrad)}:
        return False
    if hasattr(step, "_torchdynamo_orig_callable"):  # torch's compiled steps don't accept `found_inf`
        return False
    has_hooks = (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
    return not has_hooks and all(group.get("fused") for group in optimizer.param_groups)
