"""A run whose loader has workers, started as in the usage line, that says when it trains and how each rank ended.

Usage: signals.py FOLDER (fork, spawn or forkserver)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook


class Samples(Dataset):  # type: ignore[type-arg]
    """Says that a worker serves it; the first sample of each takes a moment, so that signals find them at work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        (self.folder / f"worker.{os.getpid()}").touch()
        time.sleep(0.002)
        return torch.full((4,), index / 64)


class Stuck(Samples):
    """A sample that never comes."""

    def __getitem__(self, index: int) -> torch.Tensor:
        (self.folder / f"worker.{os.getpid()}").touch()
        time.sleep(1000)
        return torch.zeros(4)


class Trainer(BaseTrainer):
    def __init__(self, folder: Path, method: str) -> None:
        self.folder, self.method = folder, method
        super().__init__(100_000, workspace=folder, seed=0)

    def build_data_loader(self) -> Any:
        context = multiprocessing.get_context(self.method)
        return DataLoader(Samples(self.folder), batch_size=4, num_workers=2, multiprocessing_context=context)

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def build_optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def build_hooks(self) -> list[BaseHook]:
        return [CheckpointingHook(1_000_000, exit_signals=["SIGTERM", "SIGUSR1"])]

    def forward(self, batch: Any) -> Any:
        if self.step == 3:
            (self.folder / f"trains.{self.accelerator.process_index}").touch()
        return self.model(batch).pow(2).mean(), {}


def main() -> None:
    folder, method = Path(sys.argv[1]), sys.argv[2]
    trainer = Trainer(folder, method)
    code: Any = "none"
    try:
        trainer.train()
    except SystemExit as ex:
        code = ex.code
        raise
    except BaseException as ex:
        code = repr(ex)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher passes on the one that it got itself
        (folder / f"code.{trainer.accelerator.process_index}").write_text(str(code))


if __name__ == "__main__":
    main()
