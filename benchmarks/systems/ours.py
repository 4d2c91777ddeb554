"""trainloop, with and without hooks."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, LoggingHook, ProgressHook

from ..tasks import CLIP, Task, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData


class Trainer(BaseTrainer):
    def __init__(self, task: Task, data: TurnTakingData, hooks: list[BaseHook], num_records: int) -> None:
        self._task, self._data, self._given_hooks, self._num_records = task, data, hooks, num_records
        super().__init__(
            task.num_batches // task.num_micro,
            CLIP,
            gradient_accumulation_steps=task.num_micro,
            mixed_precision=task.precision,
            workspace=data.folder,
            device=task.device,
            seed=0,
        )

    def build_data_loader(self) -> Any:
        return self._data.loader()

    def build_model(self) -> Any:
        model = make_model(self._task.model)
        return torch.compile(model) if self._task.is_compiled else model

    def build_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self._task, self.model.parameters())

    def build_hooks(self) -> list[BaseHook]:
        return self._given_hooks

    def forward(self, batch: Any) -> Any:
        x, y = batch
        loss = loss_of(self.model(x), y)
        return loss, {str(i): loss for i in range(self._num_records)}


def train(
    task: Task, data: TurnTakingData, hooks: str | int = 0, num_records: int = 0, is_deterministic: bool = False
) -> nn.Module:
    """`hooks`: how many empty ones, or "four", or "log" (LoggingHook alone)."""
    if is_deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    given: list[BaseHook]
    if hooks == "four":
        never = task.num_batches + 1
        given = [LoggingHook(), ProgressHook(50), EmaHook(0.999), CheckpointingHook(never)]
    elif hooks == "log":
        given = [LoggingHook()]
    else:
        given = [BaseHook() for _ in range(int(hooks))]
    trainer = Trainer(task, data, given, num_records)
    trainer.train()
    return trainer.unwrapped_model
