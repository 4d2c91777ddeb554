"""Trains with everything that a resume must bring back, and dies where it is told to.

Usage: accelerate launch resume.py WORKSPACE LAST_STEP NUM_WORKERS IS_ASYNC HOW DEATH_STEP RANK
HOW: "never", "kill" (SIGKILL), "term" (SIGTERM)
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, LoggingHook

workspace, last_step, num_workers, is_async, how, death_step, death_rank = sys.argv[1:]


class Noisy(Dataset):  # type: ignore[type-arg]
    """Augmented by the process's generator."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(6, generator=generator) + 0.1 * torch.randn(6)


class Die(BaseHook):
    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == int(death_step) and trainer.accelerator.process_index == int(death_rank):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "term":
                os.kill(os.getpid(), signal.SIGTERM)


class Log(BaseHook):
    """Appends what is logged, so that all lives of the run are in one file."""

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        kept = {k: v for k, v in records["train"].items() if not k.endswith("_time")}
        with Path(workspace, f"log.{trainer.accelerator.process_index}.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.step, **kept}) + "\n")


class Trainer(BaseTrainer):
    def build_data_loader(self) -> Any:
        return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=int(num_workers))

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 16), nn.Linear(16, 1))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=20)

    def build_hooks(self) -> list[BaseHook]:
        save = CheckpointingHook(2, keep_previous=1, async_save=is_async == "1", exit_signals="SIGTERM")
        hooks: list[BaseHook] = [LoggingHook(interval=5), save, Log(), Die()]
        return hooks[::-1] if how == "kill" else hooks  # the order never matters

    def forward(self, batch: Any) -> Any:
        loss = (self.model(batch) - batch.sum(1, keepdim=True)).pow(2).mean()
        return loss, {"mse": loss.detach()}


def digest(trainer: BaseTrainer) -> str:
    """Every bit of this rank's state."""
    total = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                total.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif isinstance(value, torch.Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value
            total.update(local.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(value).encode())

    state_dict = trainer.state_dict()
    interval = state_dict["rank"]["LoggingHook_5"]
    interval["sums"] = [row for row in interval["sums"] if not row[0][0].endswith("_time")]  # the clock goes on
    walk(state_dict)
    return total.hexdigest()


trainer = Trainer(int(last_step), grad_clip=1.0, gradient_accumulation_steps=3, workspace=workspace, seed=9)
trainer.train()
result = {"step": trainer.step, "digest": digest(trainer), "processes": trainer.accelerator.num_processes}
Path(workspace, f"{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
