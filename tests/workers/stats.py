"""Logs records that only some ranks have, and writes what each rank was told.

Usage: accelerate launch stats.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer, LoggingHook


class Log(BaseHook):
    def __init__(self) -> None:
        self.logged: list[Any] = []

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self.logged.append({key: records["train"][key] for key in ("rank", "only_1", "loss")})


class Trainer(BaseTrainer):
    def build_data_loader(self) -> Any:
        return [torch.ones(1, 2)] * 4

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def build_optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.0)

    def build_hooks(self) -> list[BaseHook]:
        self.log_hook = Log()
        return [LoggingHook(interval=2), self.log_hook]

    def forward(self, batch: Any) -> Any:
        rank = self.accelerator.process_index
        records = {"rank": rank} | ({"only_1": torch.tensor(7.0)} if rank == 1 else {})
        return self.model(batch).sum() * 0 + rank * 5.0, records


if __name__ == "__main__":
    trainer = Trainer(3, seed=0)
    trainer.train()
    Path(sys.argv[1], f"{trainer.accelerator.process_index}.json").write_text(json.dumps(trainer.log_hook.logged))
