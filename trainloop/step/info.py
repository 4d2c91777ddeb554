"""The measurements of one optimizer step, and their means over a log interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..records import Records
from .loss_weights import weighted_loss


@dataclass(slots=True)
class StepInfo:
    """The measurements of the optimizer step that began last, on this rank.

    It is not frozen: the step fills it while it runs, and a hook may add its own measurement. Tensors stay on the
    device. Reading one costs a device-to-host sync, so read them at an interval.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    """Detached loss of each micro-batch of the applied window, 0-dim, on the device."""
    loss_factors: list[Any] | None = None
    """Weight of each loss in `loss` (numbers or 0-dim tensors). `None`: all weigh the same."""
    records: list[Records] = field(default_factory=list)
    """The records that `forward` returned beside each loss."""
    grad_norm: float = float("nan")
    """2-norm of the whole model's gradient before clipping; the same on every rank."""
    lr: list[Any] = field(default_factory=list)
    """Learning rate of each parameter group in this update: a number, or a 0-dim tensor if the optimizer has one."""
    step_time: float = 0.0
    """Wall time of the step in seconds, including the wait for data and retries."""
    data_time: float = 0.0
    """The part of `step_time` spent waiting for batches, in seconds."""
    evaluation_time: float = 0.0
    """Wall time of evaluations since the step began, in seconds."""
    own_time: float = 0.0
    """Wall time of the applied window until its last backward pass, in seconds. Under DDP it contains no waiting for
    other ranks, so it shows which rank is slow, which `step_time` can't. On an accelerator it is the host's time."""
    total_weight: Any = None
    """Sum of `batch_weight` over the applied window and all ranks, a number or a 0-dim tensor on the device. `None`:
    `batch_weight` isn't overridden, or returned None."""
    non_finite_grad_retry_count: int = 0
    """Number of windows that were discarded because their gradient was not finite."""
    overflow_count: int = 0
    """Number of windows that were discarded because the loss scale was too high (fp16 with a grad scaler)."""
    skipped_micro_batch_count: int = 0
    """Number of micro-batches for which `forward` returned no loss, or whose window had only weights of 0."""
    ends_epoch: bool = False
    """Whether the step's window has ended an epoch of the data, on all ranks. Set after the update."""
    max_memory: float | None = None
    """Peak CUDA memory in GiB, if there is a `CudaMaxMemoryHook`."""
    phases: dict[str, StepInfo] = field(default_factory=dict)
    """If the step has phases: the measurements of each, by name. The fields above then hold sums over the phases, and
    `grad_norm` is the 2-norm of all their gradients together."""

    @property
    def loss(self) -> torch.Tensor:
        """This rank's share of the step's loss, 0-dim, on the device. The mean of the shares over the ranks is the loss
        of the step. Computed on each access; costs no sync.
        """
        if self.loss_factors is not None:
            pairs = zip(self.losses, self.loss_factors, strict=True)
            shares = [
                torch.zeros_like(loss) if f == 0.0 and isinstance(f, float) else weighted_loss(loss, f)
                for loss, f in pairs
            ]
            return torch.stack(shares).mean()
        return self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).mean()

    def add_phase(self, name: str, phase: StepInfo) -> None:
        """Add the measurements of a phase.

        Args:
            name: Name of the phase.
            phase: Its measurements.
        """
        first, self.phases[name] = not self.phases, phase
        pairs = zip(self.losses, phase.losses, strict=False)
        self.losses = list(phase.losses) if first else [total + loss for total, loss in pairs]
        self.loss_factors, self.total_weight = phase.loss_factors, phase.total_weight
        self.grad_norm = phase.grad_norm if first else math.hypot(self.grad_norm, phase.grad_norm)
        self.data_time += phase.data_time
        self.own_time += phase.own_time
        self.non_finite_grad_retry_count += phase.non_finite_grad_retry_count
        self.overflow_count += phase.overflow_count
        self.skipped_micro_batch_count += phase.skipped_micro_batch_count
        self.ends_epoch = phase.ends_epoch


@dataclass(frozen=True, slots=True)
class TrainingStats:
    """Means over the steps of one log interval, and also over the ranks if the hook was built with `sync=True`."""

    loss: float
    grad_norm: float
    step_time: float
    """Seconds a step."""
    data_time: float
    """Seconds a step spent waiting for batches."""
    non_finite_grad_retry_count: float
    """Number of discarded windows in the interval, summed over its steps (the highest of any rank)."""
    max_memory: float | None
    """Highest peak of CUDA memory of any step (and rank) in GiB. `None` without `CudaMaxMemoryHook`."""
    lr: dict[str, float]
    """Learning rate of the interval's last step, by the name of the parameter group (`"0"`, `"1"`, … if the groups have
    no `name`)."""
    records: Records
    """Nested records, averaged over micro-batches, steps and (with sync) the ranks that have them."""
