"""What one optimizer step measured, and what a log interval makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..records import Records
from .loss_weights import weighted_loss


@dataclass(slots=True)
class StepInfo:
    """What the optimizer step that was begun last has measured, on this rank.

    Not frozen: the step fills it while it runs, and a hook may add its own measurement.
    Tensors stay on the device; reading one costs a device-to-host sync, so do it at an interval.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    """Detached loss of each micro-batch of the window that was applied, 0-dim, on the device."""
    loss_factors: list[Any] | None = None
    """What each loss weighs in `loss` (numbers or 0-dim tensors); `None`: all the same."""
    records: list[Records] = field(default_factory=list)
    """What `forward` returned beside each loss."""
    grad_norm: float = float("nan")
    """2-norm of the whole model's gradient before clipping; the same on every rank."""
    lr: list[Any] = field(default_factory=list)
    """Learning rate that the update used, of each parameter group: a number, or a 0-dim tensor where the optimizer has
    one."""
    step_time: float = 0.0
    """Wall time of the step in seconds, waiting for data and retries included."""
    data_time: float = 0.0
    """The part of `step_time` spent waiting for batches, in seconds."""
    evaluation_time: float = 0.0
    """Wall time of evaluations since the step began, in seconds."""
    own_time: float = 0.0
    """Wall time of the applied window until its last backward pass, in seconds. Under DDP no other rank has had a part
    in it, so it differs where `step_time`, which waits for all, does not. On an accelerator it is the host's time."""
    total_weight: Any = None
    """Sum of `batch_weight` over the applied window and all ranks, a number or a 0-dim tensor on the device; `None`:
    it isn't overridden."""
    non_finite_grad_retry_count: int = 0
    """Windows that were discarded because their gradient was not finite."""
    overflow_count: int = 0
    """Windows that were discarded because the loss scale was too high (fp16 with a grad scaler)."""
    skipped_micro_batch_count: int = 0
    """Micro-batches for which `forward` returned no loss."""
    ends_epoch: bool = False
    """Whether the step's window has ended an epoch of the data, on all ranks; known as soon as the update is done."""
    max_memory: float | None = None
    """Peak CUDA memory in GiB, if `CudaMaxMemoryHook` is there."""
    phases: dict[str, StepInfo] = field(default_factory=dict)
    """Of a step with phases: what each has measured, by name. The fields above then hold sums over the phases, and the
    2-norm of all their gradients together."""

    @property
    def loss(self) -> torch.Tensor:
        """This rank's share of the step's loss, 0-dim, on the device: the mean of it over the ranks is the loss of
        the step. Computed when asked for; costs no sync.
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
        """Take in what a phase has measured.

        Args:
            name: Of the phase.
            phase: What it has measured.
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
    """Means over the steps of one log interval; over the ranks too where the hook was built with `sync=True`."""

    loss: float
    grad_norm: float
    step_time: float
    """Seconds a step."""
    data_time: float
    """Seconds a step spent waiting for batches."""
    non_finite_grad_retry_count: float
    """Discarded windows in the interval, all its steps together (the highest of any rank)."""
    max_memory: float | None
    """Highest peak of CUDA memory of any step (and rank) in GiB; `None` without `CudaMaxMemoryHook`."""
    lr: dict[str, float]
    """Learning rate that the interval's last step used, by the name of the parameter group (`"0"`, `"1"`, … where
    the groups have no `name`)."""
    records: Records
    """Nested records, averaged over micro-batches, steps and (with sync) the ranks that have them."""
