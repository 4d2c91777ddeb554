"""Trainers whose gradients DDP sums in an order that depends on its buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook

WIDTH = 8


class Crossed(nn.Module):
    """Uses its parts in another order than it registers them, and in one that a random number decides."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(33, 1)
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.left, self.right = nn.Linear(33, 33), nn.Linear(33, 33)
        self.body = nn.Sequential(nn.Linear(WIDTH, 33), nn.BatchNorm1d(33), nn.Dropout(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        for part in (self.left, self.right) if torch.rand(()) < 0.5 else (self.right, self.left):
            x = part(self.frozen(x)).tanh()
        y: torch.Tensor = self.head(x)
        return y


def mlp(width: int, depth: int) -> nn.Module:
    inner = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), *inner, nn.Linear(width, 1))


MODELS = {
    "mlp": lambda: mlp(64, 1),
    "several buckets": lambda: mlp(301, 4),  # 1.4 MiB: DDP's first bucket has 1 MiB
    "crossed": Crossed,
}


class Untouched(BaseHook):
    """What settling the buckets must leave alone: gradients, and the hooks that the user has put on a parameter."""

    def __init__(self, param: torch.Tensor) -> None:
        self.calls = 0
        param.register_hook(self._count)  # type: ignore[no-untyped-call]
        param.register_post_accumulate_grad_hook(self._count)

    def _count(self, tensor: torch.Tensor) -> None:
        self.calls += 1

    def on_before_train(self, trainer: BaseTrainer) -> None:
        assert self.calls == 0
        assert all(p.grad is None for p in trainer.model.parameters())

    def on_after_train(self, trainer: BaseTrainer) -> None:
        assert self.calls > 0


class Trainer(BaseTrainer):
    def __init__(self, model: str, **kwargs: Any) -> None:
        self.name = model
        super().__init__(20, seed=5, **kwargs)

    def build_data_loader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(400, WIDTH, generator=generator)), batch_size=4, shuffle=True)

    def build_model(self) -> nn.Module:
        return MODELS[self.name]()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return [CheckpointingHook(13), Untouched(next(self.model.parameters()))]

    def forward(self, batch: Any) -> Any:
        return (self.model(batch[0]) - batch[0].sum(1, keepdim=True).sin()).pow(2).mean(), {}


def make_trainer(workspace: Path, *, model: str, accumulation: int) -> Trainer:
    return Trainer(model, workspace=workspace, gradient_accumulation_steps=accumulation)
