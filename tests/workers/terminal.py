"""A run with all that writes to a terminal: its log, an evaluation, warnings, other libraries, a print, another rank.

Usage: terminal.py FOLDER (signal or crash)
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.screens import Meetings
from tests.small import SmallTrainer
from trainloop import BaseHook, CheckpointingHook, EvaluationHook, ProgressHook

OTHER = logging.getLogger("other")  # of a library that has set up its own log before the run
OTHER.addHandler(logging.StreamHandler(sys.stderr))


class Scenes(BaseHook):
    """Writes something after some steps, and waits for the test to look."""

    def __init__(self, folder: Path, end: str) -> None:
        self.meetings, self.end = Meetings(folder) if end == "signal" else None, end

    def meet(self, trainer: Any, name: str) -> None:
        if self.meetings is not None and trainer.accelerator.is_main_process:
            self.meetings.wait(name)

    def on_after_step(self, trainer: Any) -> None:
        rank = trainer.accelerator.process_index
        if trainer.step == 2:
            self.meet(trainer, "training")
        if trainer.step == 5 and rank == 0:
            OTHER.warning("a line of another library")
            print("a line of the script")
            print("half ", end="", flush=True)
            self.meet(trainer, "half")
            print("a line")
            os.write(2, b"a line of a library in C++\n")
            time.sleep(0.2)  # the next step draws the bar again
        if trainer.step == 6:
            self.meet(trainer, "lines")
        if trainer.step == 7 and rank == 1:
            warnings.warn("a warning of rank 1", stacklevel=1)
        if trainer.step == 9:
            trainer.accelerator.wait_for_everyone()
            self.meet(trainer, "end")
            if self.end == "crash":
                raise RuntimeError("a crash under the bar")


class Trainer(SmallTrainer):
    """Its evaluation takes long enough for a bar of its own."""

    scenes: Scenes
    num_evaluated = 0

    def build_eval_data_loader(self) -> Any:
        x = torch.arange(36.0).reshape(12, 3) / 36
        return DataLoader(TensorDataset(x), batch_size=1)

    def eval_forward(self, batch: Any) -> Any:
        self.num_evaluated += 1
        if self.num_evaluated == 2:
            time.sleep(0.6)
        if self.num_evaluated == 3:
            self.scenes.meet(self, "evaluation")
        if self.num_evaluated == 4 and self.accelerator.is_main_process:
            warnings.warn("a warning in the evaluation", stacklevel=1)
            self.scenes.meet(self, "warning")
        return self.forward(batch)


if __name__ == "__main__":
    folder, end = Path(sys.argv[1]), sys.argv[2]
    scenes = Scenes(folder, end)
    trainer = Trainer(
        11 if end == "crash" else 1000,
        workspace=folder,
        hooks_=lambda self: [
            ProgressHook(interval=4, eta_warmup=1),
            EvaluationHook(interval=4, at_end=False),
            scenes,
            CheckpointingHook(1000, exit_signals="SIGTERM"),
        ],
    )
    trainer.scenes = scenes
    (folder / f"pid.{trainer.accelerator.process_index}").write_text(str(os.getpid()))
    trainer.train()
