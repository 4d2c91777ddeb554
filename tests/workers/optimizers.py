"""Muon and AdamW side by side over epochs that end in the middle of a window, and the same as a plain loop.

Usage: accelerate launch optimizers.py OUT NAME [CHECKPOINT]
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook
from trainloop.ranks import collectives

NUM_SAMPLES, BATCH, NUM_MICRO, EPOCHS, DECAY = 22, 6, 2, 4, 0.5
ENDS = [2, 4, 6, 8]
"""The steps whose windows of 12 samples end an epoch of 22: after 24, 48, 72 and 96 samples."""
LRS = torch.optim.lr_scheduler


def build_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2))


def optimizers_of(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The hidden matrices go to Muon, the rest to AdamW, in two groups."""
    *hidden, last = [param for param in model.parameters() if param.ndim == 2]
    groups = [{"params": [last], "lr": 1e-2}, {"params": [param for param in model.parameters() if param.ndim < 2]}]
    return {"muon": torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1), "adamw": torch.optim.AdamW(groups, lr=3e-2)}


def schedules_of(optimizers: Any) -> dict[str, Any]:
    return {"muon": LRS.ExponentialLR(optimizers["muon"], 0.9), "adamw": LRS.StepLR(optimizers["adamw"], 3, 0.5)}


def data() -> TensorDataset:
    x = torch.randn(NUM_SAMPLES, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1))


class Recorder(BaseHook):
    """The mean loss over the ranks and the norm of each step, and the steps that end an epoch."""

    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}
        self.ends: list[int] = []

    def on_after_step(self, trainer: Any) -> None:
        loss = collectives.sum_over_ranks([trainer.step_info.loss.item()])[0] / collectives.world_size()
        self.rows[trainer.step] = [loss, trainer.step_info.grad_norm]
        if trainer.is_due("epoch"):
            self.ends.append(trainer.step)


class Trainer(BaseTrainer):
    def __init__(self, folder: Path, load: Path | None = None) -> None:
        self.recorder, self.load = Recorder(), load
        super().__init__(
            max_epochs=EPOCHS, grad_clip=0.3, gradient_accumulation_steps=NUM_MICRO, seed=0, workspace=folder
        )

    def build_data_loader(self) -> Any:
        return DataLoader(data(), batch_size=BATCH // self.accelerator.num_processes)

    def build_model(self) -> nn.Module:
        return build_model()

    def build_optimizer(self) -> Any:
        return optimizers_of(self.model)

    def build_lr_scheduler(self) -> Any:
        return schedules_of(self.optimizer)

    def build_hooks(self) -> list[BaseHook]:
        return [self.recorder, EmaHook(DECAY), CheckpointingHook(1, keep_previous=99, load=self.load)]

    def forward(self, batch: Any) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), {}


def plain() -> tuple[dict[int, list[float]], dict[str, torch.Tensor]]:
    """The same without the trainer: losses and norms by step, and the weights at the end. Epochs follow each other
    without a gap.
    """
    model = build_model()
    optimizers = optimizers_of(model)
    schedules = schedules_of(optimizers)
    inputs, targets = (torch.cat([tensor] * (EPOCHS + 1)).split(BATCH) for tensor in data().tensors)
    rows = {}
    for step in range(1, ENDS[-1] + 1):
        losses = []
        for i in range(NUM_MICRO * (step - 1), NUM_MICRO * step):
            loss = nn.functional.mse_loss(model(inputs[i]), targets[i])
            (loss / NUM_MICRO).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules.values():
            schedule.step()
        rows[step] = [sum(losses) / NUM_MICRO, norm.item()]
    return rows, {name: param.detach() for name, param in model.named_parameters()}


def run(out: Path, name: str, load: Path | None = None) -> dict[str, Any]:
    """A run to its last epoch, and what this rank has seen of it."""
    trainer = Trainer(out / name, load)
    trainer.train()
    state = trainer.state_dict()
    tensors: dict[str, Any] = {**state["model"], **{f"ema/{key}": value for key, value in state["ema"].items()}}
    for param, values in state["training_state"]["optimizer"]["state"].items():
        tensors |= {f"{param}/{key}": value for key, value in values.items()}
    whole = {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in tensors.items()}
    return {
        "rows": list(trainer.recorder.rows.items()),
        "ends": trainer.recorder.ends,
        "epoch": trainer.epoch,
        "steps": [trainer.max_steps, trainer.steps_per_epoch],
        "state": {key: value.flatten().tolist() for key, value in whole.items()},
    }


class AllMuon(Trainer):
    def build_optimizer(self) -> Any:
        return torch.optim.Muon([param for param in self.model.parameters() if param.ndim == 2])

    def build_lr_scheduler(self) -> Any:
        return None


def main() -> None:
    out, name, *load = sys.argv[1:]
    found = run(Path(out), name, *map(Path, load))
    if not load:  # the same again at the same number of processes, bit for bit
        again = run(Path(out), "again", Path(out) / name / "checkpoints" / "step_0000005")
        found["again"] = again["state"] == found["state"] and again["rows"] == found["rows"][5:]
    else:
        found["refused"] = ""
        try:
            AllMuon(Path(out) / "refused")._build()
        except ValueError as ex:
            found["refused"] = str(ex)
    (Path(out) / f"{name}{collectives.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    main()
