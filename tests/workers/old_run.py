"""The run that an older trainloop began and today's must continue. Its checkpoints are in tests/data/format_1/ and
format_2/.

Usage, with the older checkout on PYTHONPATH: python old_run.py FOLDER
It writes a checkpoint, and how the older version continues after it. It uses only names that every version has.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook

SAVED_STEP = 6
MAX_STEPS = 14
CHECKPOINTS = "checkpoints"
EXPECTED = "expected.json"


class Augmented(Dataset):  # type: ignore[type-arg]
    """Sample i: its number, and values with noise from the process's generator."""

    def __len__(self) -> int:
        return 27  # an epoch ends in the middle of a window

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.sin(torch.arange(4.0) * (index + 1)) + 0.1 * torch.randn(4)


class Trace(BaseHook):
    """The samples and numbers of each step. The numbers are hexadecimal, so that no bit is lost."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: list[int] = []

    def on_before_step(self, trainer: BaseTrainer) -> None:
        self.samples.clear()
        self.lr = trainer.optimizer.param_groups[0]["lr"]

    def on_after_step(self, trainer: BaseTrainer) -> None:
        info = trainer.step_info
        numbers = {"loss": info.loss.item(), "grad_norm": info.grad_norm, "lr": self.lr}
        self.rows.append(
            {"step": trainer.step, "samples": list(self.samples), **{k: v.hex() for k, v in numbers.items()}}
        )


class OldRun(BaseTrainer):
    """Dropout, BatchNorm, AdamW with two groups, OneCycle, EMA, augmentation, an accumulation of 2."""

    def __init__(self, workspace: Path) -> None:
        super().__init__(MAX_STEPS, grad_clip=1.0, gradient_accumulation_steps=2, workspace=workspace, seed=11)

    def build_data_loader(self) -> Any:
        return DataLoader(Augmented(), batch_size=3, shuffle=True)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 4))

    def build_optimizer(self) -> torch.optim.Optimizer:
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        return torch.optim.AdamW([{"params": weights}, {"params": others, "weight_decay": 0.0}], lr=0.01)

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.01, total_steps=MAX_STEPS + 1)

    def build_hooks(self) -> list[BaseHook]:
        self.trace = Trace()
        self.average = EmaHook(0.9)
        return [self.trace, self.average, CheckpointingHook(SAVED_STEP, path=CHECKPOINTS, keep_steps=[SAVED_STEP])]

    def forward(self, batch: Any) -> Any:
        index, x = batch
        self.trace.samples += index.tolist()
        loss = nn.functional.mse_loss(self.model(x), x)
        return loss, {"loss": loss.detach()}


def machine() -> list[str]:
    """Where the kernels give the same bits: the build of torch, and the vector instructions that it uses."""
    return [torch.__version__, torch.backends.cpu.get_cpu_capability()]


def digest(trainer: OldRun) -> str:
    """Of the bits of the model, its average and the optimizer's state."""
    model, optimizer = trainer.unwrapped_model, trainer.optimizer
    tensors = [*model.state_dict().values()]
    tensors += [tensor for p in model.parameters() for _, tensor in sorted(optimizer.state[p].items())]
    with trainer.average.swapped(trainer):
        tensors += [tensor.clone() for tensor in model.state_dict().values()]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer = OldRun(folder)
    trainer.train()
    expected = {"machine": machine(), "rows": trainer.trace.rows[SAVED_STEP:], "digest": digest(trainer)}
    (folder / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder / CHECKPOINTS / f"step_{MAX_STEPS:07d}")
    for leftover in ("latest", ".lock"):
        (folder / CHECKPOINTS / leftover).unlink(missing_ok=True)
