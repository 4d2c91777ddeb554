"""Trainers that do not resume exactly, each for a reason of its own, made where a life of a run begins."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook

from ..small import SmallTrainer

OWN_GENERATOR = random.Random(5)
"""Not one of those that a checkpoint has."""


class Counting(BaseHook):
    """Counts steps, in no state that is saved, and logs the count."""

    def __init__(self) -> None:
        self.count = 0

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.count += 1
        trainer.log({"count": self.count})


class Decaying(BaseHook):
    """Changes the weights by how often it was called, so that the state shows it at the end."""

    def __init__(self) -> None:
        self.count = 0

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        self.count += 1
        if trainer.step == trainer.max_steps:
            with torch.no_grad():
                next(trainer.model.parameters()).view(-1)[1] += self.count


class Clock(BaseHook):
    """Logs what is never the same twice."""

    def on_after_step(self, trainer: BaseTrainer) -> None:
        trainer.log({"now_seconds": time.time()})


class Shuffled(Dataset):  # type: ignore[type-arg]
    """Draws from a generator that nobody saves."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.full((3,), OWN_GENERATOR.random())


def make_trainer(workspace: Path, *, reason: str = "") -> Any:
    hooks: list[BaseHook] = [CheckpointingHook(2)]
    given: dict[str, Any] = {"hooks_": lambda self: hooks}
    if reason == "hook":
        hooks.append(Counting())
    elif reason == "hidden":
        hooks.insert(0, Decaying())
    elif reason == "data":
        given["data_loader"] = lambda self: DataLoader(Shuffled(), batch_size=2)
        given["forward_"] = lambda self, batch: (self.model(batch[1]).pow(2).mean(), {})
    elif reason == "clock":
        hooks.append(Clock())
    elif reason == "no checkpoints":
        hooks.clear()
    elif reason == "never loads":
        hooks[0] = CheckpointingHook(2, load=None)
    elif reason == "one folder":
        hooks[0] = CheckpointingHook(2, path=workspace.parent / "shared")
    elif reason == "hangs":
        given["forward_"] = lambda self, batch: time.sleep(600)
    elif reason == "raises":
        given["forward_"] = lambda self, batch: 1 / 0
    seed = None if reason == "no seed" else 0
    return SmallTrainer(6, workspace=workspace, seed=seed, **given)
