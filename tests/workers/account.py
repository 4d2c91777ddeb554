"""A run whose lives are accounted for: made in processes that are killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainloop import BaseTrainer, CheckpointingHook, EvaluationHook, LoggingHook

INTERVAL = 10
"""Steps between checkpoints; losses are read every fifth step."""


class Regression(BaseTrainer):
    """Thirty steps over twenty samples.

    Args:
        workspace: Of the run.
        changed: A sample that has another value.
        fails_at: A step in which rank 1 fails, or the only one.
        lr: The learning rate.
        ledger: Of the CheckpointingHook.
        max_steps: Of the run.
    """

    def __init__(
        self,
        workspace: Path,
        changed: int | None = None,
        fails_at: int = 0,
        lr: float = 1e-2,
        ledger: bool = True,
        max_steps: int = 30,
        batch_size: int = 4,
        **kwargs: Any,
    ) -> None:
        self.changed, self.fails_at, self.lr, self.ledger, self.batch_size = changed, fails_at, lr, ledger, batch_size
        super().__init__(max_steps, workspace=workspace, seed=3, **kwargs)

    def build_data_loader(self) -> Any:
        x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        if self.changed is not None:
            x[self.changed] += 0.5
        data = TensorDataset(torch.arange(20), x, x.sum(1, keepdim=True))
        return DataLoader(data, batch_size=self.batch_size, shuffle=True)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)

    def build_hooks(self) -> Any:
        hooks = [LoggingHook(interval=5), CheckpointingHook(interval=INTERVAL, ledger=self.ledger)]
        if self.lr != 1e-2:
            hooks[-1].on_resume = ("hyperparameters",)
        return hooks

    def forward(self, batch: Any) -> Any:
        if self.step == self.fails_at and self.accelerator.num_processes == 1:
            raise ValueError("broken on purpose")
        if self.step == self.fails_at and self.accelerator.process_index == 1:
            raise ValueError("broken on rank 1")
        _, x, y = batch
        return nn.functional.mse_loss(self.model(x), y), {}


class Slow(Regression):
    """With data and evaluations that take their time."""

    SECONDS = 0.1

    def build_data_loader(self) -> Any:
        loader = super().build_data_loader()
        return DataLoader(Sleepy(loader.dataset, self.SECONDS / 40), batch_size=4, shuffle=True)

    def build_eval_data_loader(self) -> Any:
        return DataLoader(super().build_data_loader().dataset, batch_size=20)

    def build_hooks(self) -> Any:
        return [*super().build_hooks(), EvaluationHook(10)]

    def eval_forward(self, batch: Any) -> Any:
        time.sleep(self.SECONDS)
        return super().forward(batch)


class Sleepy(Dataset):  # type: ignore[type-arg]
    """Samples that take a while to read."""

    def __init__(self, data: Any, seconds: float) -> None:
        self.data, self.seconds = data, seconds

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        return self.data[index]


def indices(batch: Any) -> Any:
    """What is noted of a micro-batch: the numbers of its samples."""
    return batch[0]
