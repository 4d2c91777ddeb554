"""On each rank: a dry run, a run that overfits, and hooks that write files. Usage: python rehearsal.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.small import SmallTrainer
from trainloop import BaseHook, CheckpointingHook, LoggingHook, MetricsFileHook, ProfilerHook


class Numbers(torch.utils.data.Dataset[Any]):
    """Sample i is i."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(index))


def loader(self: Any) -> Any:
    return DataLoader(Numbers(), batch_size=3, shuffle=True)


class Seen:
    """The samples of each step of this rank."""

    def __init__(self) -> None:
        self.samples: list[list[float]] = []

    def forward(self, trainer: Any, batch: Any) -> Any:
        if trainer.model.training:
            self.samples.append(batch.tolist())
        return trainer.model(batch[:, None].expand(-1, 3) / 40).pow(2).mean(), {}


def overfit(workspace: Path, steps: int, data: Any = loader, **kwargs: Any) -> list[list[float]]:
    """The samples that a run of `steps` steps sees, resumed from a checkpoint if there is one."""
    seen = Seen()
    hooks: list[BaseHook] = [CheckpointingHook(100), LoggingHook(1), MetricsFileHook()]
    kwargs = {"overfit_batches": 4, **kwargs}
    given = {"data_loader": data, "forward_": seen.forward, "hooks_": lambda self: hooks}
    SmallTrainer(steps, workspace=workspace, **given, **kwargs).train()
    return seen.samples


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    seen = Seen()
    hooks = [LoggingHook(10), MetricsFileHook(), CheckpointingHook(50), ProfilerHook(0, 1, 1)]
    given = {"data_loader": loader, "forward_": seen.forward, "hooks_": lambda self: hooks}
    rehearsed = SmallTrainer(1000, workspace=folder / "dry" / "run", dry_run=True, **given)
    rehearsed.train()
    found = {"dry": len(seen.samples), "first": overfit(folder / "run", 3), "then": overfit(folder / "run", 8)}
    rank = rehearsed.accelerator.process_index
    hooks = [ProfilerHook(0, 1, 1)]
    SmallTrainer(3, workspace=folder / "run", hooks_=lambda self: hooks).train()
    (folder / f"{rank}.json").write_text(json.dumps(found))
