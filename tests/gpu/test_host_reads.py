"""The host waits for the device once a step, for the gradient norm, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from trainloop import (
    BaseHook,
    BaseTrainer,
    CheckpointingHook,
    CudaMaxMemoryHook,
    EarlyStoppingHook,
    EmaHook,
    EvaluationHook,
    ImageFileLoggerHook,
    LoggingHook,
    ProgressHook,
    ThroughputHook,
    TrackerHook,
)

from ..small import SmallTrainer
from .devices import on_each_device

NEVER = 10**6
FIRST, LAST = 4, 12
"""Steps that are watched: what is made at first, kernels and optimizer state, may wait for the device."""


class Silent(GeneralTracker):
    """Keeps nothing."""

    name = "silent"
    requires_logging_directory = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: Any) -> None:
        pass

    def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None:
        pass


class Reads(TorchDispatchMode):
    """While it is armed: counts the values that the host reads from the device, and on a GPU raises at whatever else
    waits for it.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.is_armed, self.count = device, False, 0

    def arm(self, is_armed: bool) -> None:
        self.is_armed = is_armed
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if is_armed else "default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self.is_armed and self._is_read(func, args, kwargs or {})):
            return func(*args, **(kwargs or {}))
        self.count += 1
        self.arm(False)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.arm(True)

    def _is_read(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Of a number, or of the norm and the loss scale together."""
        if func is torch.ops.aten._to_copy.default:  # as `tolist` does it
            return args[0].is_cuda and kwargs.get("device") == torch.device("cpu") and args[0].numel() <= 2
        return func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == self.device


class Watch(BaseHook):
    """First and last of the hooks: everything between is watched."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == FIRST and not self.reads.is_armed:
            self.reads.arm(True)

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == LAST and trainer.hooks[-1] is self:
            self.reads.arm(False)


def hooks(trainer: BaseTrainer, reads: Reads) -> list[BaseHook]:
    """All that come with trainloop and need no account, none of them at its interval."""
    ema = EmaHook(0.99)
    return [
        Watch(reads),
        LoggingHook(NEVER),
        ProgressHook(NEVER),
        ema,
        EvaluationHook(NEVER, data_loader=[(torch.ones(8, 16),)], ema=ema, at_end=False),
        EarlyStoppingHook("val/loss"),
        CudaMaxMemoryHook(),
        ThroughputHook(flops_per_step=1e9, peak_flops=1e12, interval=NEVER),
        ImageFileLoggerHook(),
        TrackerHook(Silent()),
        CheckpointingHook(NEVER, async_save=True, exit_signals="SIGTERM"),
        Watch(reads),
    ]


class WeightedTrainer(SmallTrainer):
    def batch_weight(self, batch: Any) -> float:
        return float(len(batch[0]))


CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "workers": {},
    "clipped": {"grad_clip": 1e-4},
    "accumulated": {"gradient_accumulation_steps": 3, "grad_clip": 1.0},
    "weighted": {"gradient_accumulation_steps": 2},
    "bf16": {"mixed_precision": "bf16", "grad_clip": 1.0},
    "fp16": {"mixed_precision": "fp16", "grad_clip": 1.0},
    "fused": {"grad_clip": 1.0},
    "fused, fp16": {"mixed_precision": "fp16", "grad_clip": 1.0},
}


@on_each_device
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch's note that it is a prototype
@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_one_number_and_waits_for_nothing_else(device: str, case: str, tmp_path: Path) -> None:
    """With all hooks that come with trainloop, between their intervals."""
    is_fused = case.startswith("fused")
    if "fp16" in case and device == "cpu":
        pytest.skip("fp16 needs a GPU")
    reads = Reads(device)

    def optimizer(self: SmallTrainer) -> torch.optim.Optimizer:
        if device == "cpu" and not is_fused:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)  # others read their counters, which are on the CPU
        return torch.optim.AdamW(self.model.parameters(), fused=is_fused or None)

    x = torch.randn(256, 16)
    trainer = (WeightedTrainer if case == "weighted" else SmallTrainer)(
        LAST,
        workspace=tmp_path,
        device=device,
        data_loader=lambda self: DataLoader(
            TensorDataset(x), batch_size=8, pin_memory=device == "cuda", num_workers=2 * (case == "workers")
        ),
        model_=lambda self: nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Linear(64, 1)),
        optimizer_=optimizer,
        # A scale that fits from the start: what an overflow costs is another question.
        grad_scaler_=lambda self: torch.amp.GradScaler("cuda", init_scale=16.0) if "fp16" in case else None,
        lr_scheduler_=lambda self: torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.99**step),
        hooks_=lambda self: hooks(self, reads),
        forward_=lambda self, batch: ((loss := self.model(batch[0]).float().pow(2).mean()), {"mse": loss.detach()}),
        **CASES[case],
    )
    with reads:
        trainer.train()
    num_steps = LAST - FIRST + 1
    # None where the norm comes to the host as a copy that was queued before the update.
    assert reads.count <= num_steps
    assert trainer.step == LAST
