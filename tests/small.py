"""A trainer to derive from in tests: a linear model on eight samples, one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer


class SmallTrainer(BaseTrainer):
    """Each factory and `forward` may be given as a keyword; it is called with the trainer (and the batch)."""

    def __init__(self, max_steps: int = 2, **kwargs: Any) -> None:
        self.given: dict[str, Callable[..., Any]] = {
            name: kwargs.pop(name)
            for name in list(kwargs)
            if name in {"data_loader", "model_", "optimizer_", "lr_scheduler_", "grad_scaler_", "hooks_", "forward_"}
        }
        super().__init__(max_steps, seed=kwargs.pop("seed", 0), **kwargs)

    def _given(self, name: str, default: Callable[..., Any], *args: Any) -> Any:
        return self.given.get(name, default)(self, *args)

    def build_data_loader(self) -> Any:
        x = torch.arange(24.0).reshape(8, 3) / 24
        return self._given("data_loader", lambda self: DataLoader(TensorDataset(x), batch_size=2))

    def build_model(self) -> Any:
        return self._given("model_", lambda self: nn.Linear(3, 1))

    def build_optimizer(self) -> Any:
        return self._given("optimizer_", lambda self: torch.optim.SGD(self.model.parameters(), lr=0.1))

    def build_lr_scheduler(self) -> Any:
        return self._given("lr_scheduler_", lambda self: None)

    def build_grad_scaler(self) -> Any:
        return self._given("grad_scaler_", lambda self: None)

    def build_hooks(self) -> Any:
        return self._given("hooks_", lambda self: [])

    def forward(self, batch: Any) -> Any:
        return self._given("forward_", lambda self, batch: (self.model(batch[0]).pow(2).mean(), {}), batch)
