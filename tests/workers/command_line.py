"""Trains with a hook that averages, and writes what every rank together holds at the end, to compare exports with.

Usage: accelerate launch command_line.py WORKSPACE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.small import SmallTrainer
from trainloop import BaseHook, BaseTrainer, CheckpointingHook
from trainloop.checkpoint import BestK

workspace = Path(sys.argv[1])


class Average(BaseHook):
    """Half of each weight, sharded as it is."""

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        state_dict["ema"] = {name: tensor / 2 for name, tensor in trainer.live_model_state().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


class Model(nn.Sequential):
    """Odd sizes, so that the ranks hold parts of different sizes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 37), nn.LayerNorm(37), nn.Linear(37, 41), nn.Linear(41, 1))


save = CheckpointingHook(2, keep_previous=1, keep=[BestK("val/loss", 2)])
trainer = SmallTrainer(
    5,
    workspace=workspace,
    model_=lambda self: Model(),
    optimizer_=lambda self: torch.optim.AdamW(self.model.parameters(), lr=1e-2),
    hooks_=lambda self: [save, Average()],
)
trainer.train()
state = trainer.live_state_dict()
flat = {
    f"{name}/{key}": value
    for name, entry in state["training_state"]["optimizer"]["state"].items()
    for key, value in entry.items()
}
for group, tensors in (("model", state["model"]), ("ema", state["ema"]), ("optim", flat)):
    gathered = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
    if trainer.accelerator.is_main_process:
        save_file(gathered, workspace / f"{group}.safetensors")
