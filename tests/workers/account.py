"""A run whose lives are accounted for: made in processes that are killed, and in scripts of the launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer, CheckpointingHook, LoggingHook


class Regression(BaseTrainer):
    """Twelve steps, a checkpoint every fourth, losses read every second. Sample `changed` has another value.

    Rank 1 fails at step `fails_at`.
    """

    def __init__(self, workspace: Path, changed: int | None = None, fails_at: int = 0, **kwargs: Any) -> None:
        self.changed, self.fails_at = changed, fails_at
        self.hook_options = {key: kwargs.pop(key) for key in ("ledger", "async_save") if key in kwargs}
        super().__init__(kwargs.pop("max_steps", 12), workspace=workspace, seed=kwargs.pop("seed", 3), **kwargs)

    def build_data_loader(self) -> Any:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        if self.changed is not None:
            x[self.changed] += 0.5
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self) -> Any:
        return [LoggingHook(interval=2), CheckpointingHook(interval=4, **self.hook_options)]

    def forward(self, batch: Any) -> Any:
        if self.step == self.fails_at and self.accelerator.process_index == 1:
            raise ValueError("broken on rank 1")
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), {}
