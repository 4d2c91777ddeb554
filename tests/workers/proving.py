"""Trainers for `trainloop prove`: exact ones, and some that are inexact on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer, CheckpointingHook

from ..small import SmallTrainer
from . import inexact
from .account import Regression


class Shrinking(BaseHook):
    """Scales the weights by how often it was called, which no checkpoint has."""

    def __init__(self) -> None:
        self.count = 0

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        self.count += 1
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(1 - 0.01 * self.count)


def exact(workspace: Path) -> Any:
    return Regression(workspace)


def shrinking(workspace: Path) -> Any:
    return SmallTrainer(4, workspace=workspace, hooks_=lambda self: [Shrinking(), CheckpointingHook(2)])


def other_samples(workspace: Path) -> Any:
    return inexact.make_trainer(workspace, reason="data")


def unseeded(workspace: Path) -> Any:
    """Never the same twice, also if nobody kills it."""
    return inexact.make_trainer(workspace, reason="clock")


def by_rank(workspace: Path) -> Any:
    """Each rank has a loss of its own."""

    def forward(self: Any, batch: Any) -> Any:
        return self.model(batch[0]).pow(2).mean() * (1 + self.accelerator.process_index), {}

    return SmallTrainer(4, workspace=workspace, forward_=forward)


def dropout(workspace: Path) -> Any:
    return SmallTrainer(4, workspace=workspace, model_=lambda self: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5)))


def fails(workspace: Path) -> Any:
    return Regression(workspace, fails_at=5)


def no_arguments() -> Any:
    return None


def no_trainer(workspace: Path) -> Any:
    return "a text"
