"""A short run that a launcher restarts; where and how ranks end is given by lives.

Usage: accelerate launch restarts.py WORKSPACE MAX_STEPS [LIFE:RANK:STEP:HOW ...]
LIFE counts the starts of the rank's process from 0, "*" is any; STEP 0 is before the ranks have met.
HOW: "kill", "raise", "hang", "TERM" (the signal, to itself).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook

workspace, max_steps, *deaths = sys.argv[1:]
RANK = int(os.environ["RANK"])
LIFE = len(list(Path(workspace).glob(f"life.{RANK}.*")))
Path(workspace).mkdir(parents=True, exist_ok=True)
Path(workspace, f"life.{RANK}.{LIFE}").touch()


class Trainer(BaseTrainer):
    def build_accelerator(self) -> Any:
        self.end_here(0)
        return super().build_accelerator()

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=4, shuffle=True)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8))

    def build_optimizer(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return [CheckpointingHook(5, exit_signals="SIGTERM")]

    def forward(self, batch: Any) -> Any:
        self.end_here(self.step)
        return self.model(batch[0]).pow(2).mean(), {}

    def end_here(self, step: int) -> None:
        for death in deaths:
            life, *where, how = death.split(":")
            if life in (str(LIFE), "*") and where == [str(RANK), str(step)]:
                self.end(how)

    def end(self, how: str) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raise":
            raise ValueError("sample 17 is broken")
        elif how == "hang":
            time.sleep(600)
        else:
            os.kill(os.getpid(), getattr(signal, f"SIG{how}"))


trainer = Trainer(int(max_steps), workspace=workspace, seed=0, timeout=float(os.environ.get("TIMEOUT", "60")))
trainer.train()
trainer.accelerator.print(f"finished at step {trainer.step}")
trainer.accelerator.end_training()
