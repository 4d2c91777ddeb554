"""Runs scenarios of the step, one after another in one launch, and writes what each rank saw.

Usage: accelerate launch traces.py OUT scenario...

`TRACES_BACKEND` names another backend than Accelerate's choice: two ranks on one GPU can't use NCCL.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer

NUM_SAMPLES = 46  # not divisible by any global batch used here
BATCH = 12  # samples of one micro-batch, all ranks together
STEPS = 20


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, targets: 46 x 6, 46 x 1."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(NUM_SAMPLES, 6, generator=generator, dtype=torch.float64)
    return x, x.pow(2).sum(1, keepdim=True).sin() + x[:, :1]


def make_model() -> nn.Module:
    """Three layers in fp64, so that a comparison at 1e-6 says something about the algorithm, not about rounding."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.1)


def make_lr_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=STEPS + 1)


def sample_weight(x: torch.Tensor) -> torch.Tensor:
    """A weight for each sample, as the number of target tokens would be: 0 to 4."""
    return (x[:, 0].abs() * 3).floor().clamp(max=4)


class Trace(BaseHook):
    """Loss, norm and learning rate of each step, and how many samples it came from."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_before_step(self, trainer: BaseTrainer) -> None:
        self.lr = trainer.optimizer.param_groups[0]["lr"]

    def on_after_step(self, trainer: BaseTrainer) -> None:
        info = trainer.step_info
        loss = trainer.accelerator.reduce(info.loss, reduction="mean").item()
        self.rows.append({"loss": loss, "norm": info.grad_norm, "lr": self.lr, "micro": len(info.losses)})


class TracedTrainer(BaseTrainer):
    """The model above on the data above; each rank's batch is its share of `BATCH`."""

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(*data()), batch_size=BATCH // self.accelerator.num_processes)

    def build_model(self) -> nn.Module:
        return make_model()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)

    def build_lr_scheduler(self) -> Any:
        return make_lr_scheduler(self.optimizer)

    def build_hooks(self) -> list[BaseHook]:
        self.trace = Trace()
        return [self.trace]

    def forward(self, batch: Any) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), {}


class WeightedTrainer(TracedTrainer):
    """Mean over the samples' weights, which differ from rank to rank and may be 0 for a whole micro-batch."""

    def batch_weight(self, batch: Any) -> float:
        return float(sample_weight(batch[0]).sum())

    def forward(self, batch: Any) -> Any:
        x, y = batch
        weight = sample_weight(x)
        error = (self.model(x) - y).squeeze(1).pow(2)
        return (error * weight).sum() / weight.sum(), {}  # NaN where nothing counts


class DifferentSeedsTrainer(TracedTrainer):
    """Ranks draw different initial weights; rank 0's must be everyone's."""

    def build_model(self) -> nn.Module:
        model = make_model()
        if self.accelerator.process_index > 0:
            for p in model.parameters():
                nn.init.normal_(p)
        return model


class NoneLossTrainer(TracedTrainer):
    """Every third draw gives no loss, alike on all ranks."""

    draws = 0

    def forward(self, batch: Any) -> Any:
        self.draws += 1
        return (None, {}) if self.draws % 3 == 0 else super().forward(batch)


SCENARIOS: dict[str, tuple[type[TracedTrainer], dict[str, Any]]] = {
    "plain": (TracedTrainer, {}),
    "accumulation": (TracedTrainer, {"gradient_accumulation_steps": 3}),
    "always_synced": (TracedTrainer, {"gradient_accumulation_steps": 3, "no_sync_accumulate": False}),
    "clipped": (TracedTrainer, {"grad_clip": 0.3}),
    "weighted": (WeightedTrainer, {}),
    "weighted_accumulation": (WeightedTrainer, {"gradient_accumulation_steps": 3}),
    "different_seeds": (DifferentSeedsTrainer, {}),
    "none_loss": (NoneLossTrainer, {"gradient_accumulation_steps": 3}),
}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    out, *names = sys.argv[1:]
    if "TRACES_BACKEND" in os.environ:
        torch.distributed.init_process_group(os.environ["TRACES_BACKEND"])
    for name in names:
        cls, kwargs = SCENARIOS[name]
        trainer = cls(STEPS, seed=11, **kwargs)
        trainer.train()
        result = {
            "trace": trainer.trace.rows,
            "parameters": {n: full(p.detach()).tolist() for n, p in trainer.unwrapped_model.named_parameters()},
            "is_sharded": any(hasattr(p, "device_mesh") for p in trainer.model.parameters()),
            "model": type(trainer.model).__name__,
        }
        Path(out, f"{name}.{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
