"""Trains under flags of `accelerate launch`, and writes what rank 0 saw.

Usage: accelerate launch accelerate_flags.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.small import SmallTrainer
from trainloop import BaseHook, BaseTrainer

STEPS = 6
NUM_BLOCKS = 2


class Block(nn.Module):
    """The kind of layer that is wrapped, checkpointed and compiled. Run again, its dropout needs the same noise."""

    num_calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            Block.num_calls += 1
        y: torch.Tensor = x + self.dropout(torch.tanh(self.linear(x)))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.out = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.out(x)
        return y


class Losses(BaseHook):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.losses.append(trainer.step_info.loss.item())


def main() -> None:
    losses = Losses()
    trainer = SmallTrainer(
        STEPS,
        grad_clip=1.0,
        model_=lambda self: Net(),
        optimizer_=lambda self: torch.optim.AdamW(self.model.parameters(), lr=1e-2),
        hooks_=lambda self: [losses],
    )
    trainer.train()
    state: dict[str, Any] = trainer.state_dict()["model"]
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    classes = {type(module).__name__ for module in trainer.model.modules()}
    result = {
        "losses": losses.losses,
        "weights": {name: tensor.tolist() for name, tensor in whole.items()},
        "num_calls": Block.num_calls,
        "classes": sorted(classes),
    }
    if trainer.accelerator.process_index == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
