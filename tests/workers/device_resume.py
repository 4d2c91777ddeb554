"""A trainer with all that draws, averages and saves on a device, made where a life of a run begins."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, LoggingHook

from .resume import Noisy

NUM_GROUPS = 8


class Net(nn.Module):
    """Dropout, BatchNorm, and perhaps a sum over scattered indices, which CUDA adds up in any order."""

    def __init__(self, scatters: bool) -> None:
        super().__init__()
        self.scatters = scatters
        self.hidden = nn.Sequential(nn.Linear(6, 256), nn.BatchNorm1d(256), nn.Dropout(0.3), nn.Linear(256, 256))
        self.out = nn.Linear(NUM_GROUPS if scatters else 256, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(x + 0.1 * torch.randn_like(x)).float()
        if self.scatters:
            index = torch.arange(hidden.shape[1], device=x.device) % NUM_GROUPS
            hidden = hidden.new_zeros(len(hidden), NUM_GROUPS).index_add(1, index, hidden)
        y: torch.Tensor = self.out(hidden)
        return y


class Trainer(BaseTrainer):
    """AdamW, OneCycle, EMA, a pinned loader with two workers, asynchronous saves."""

    scatters: bool

    def build_data_loader(self) -> Any:
        return DataLoader(
            Noisy(), batch_size=4, shuffle=True, num_workers=2, pin_memory=self.device.type == "cuda", drop_last=True
        )

    def build_model(self) -> nn.Module:
        return Net(self.scatters)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=1000)

    def build_hooks(self) -> list[BaseHook]:
        return [LoggingHook(interval=5), EmaHook(0.9), CheckpointingHook(2, keep_previous=1, async_save=True)]

    def forward(self, batch: Any) -> Any:
        _, x = batch
        loss = (self.model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        return loss, {"mse": loss.detach()}


def make_trainer(
    workspace: Path, *, device: str, is_deterministic: bool, scatters: bool, mixed_precision: str = "no"
) -> Trainer:
    kwargs: dict[str, Any] = {}
    if is_deterministic:
        if "deterministic" in inspect.signature(BaseTrainer.__init__).parameters:
            kwargs["deterministic"] = True
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)
    trainer = Trainer(
        13,
        grad_clip=1.0,
        gradient_accumulation_steps=3,
        workspace=workspace,
        seed=9,
        device=device,
        mixed_precision=mixed_precision,
        **kwargs,
    )
    trainer.scatters = scatters
    return trainer
