"""Runs examples/lora.py in bf16. The first life is killed after a step; each rank writes its losses and batches.

Usage: accelerate launch lora.py OUT
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from examples.lora import LoraTrainer, parse
from trainloop import BaseHook

ARGUMENTS = ["--interval", "2", "--batch-size", "2", "--rank", "4", "--lr", "1e-2"]
STEPS, KILLED_AT = 6, 5


class Kill(BaseHook):
    """Kills the rank that is first, once."""

    def __init__(self, out: Path) -> None:
        self.marker = out / "killed"

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == KILLED_AT and trainer.accelerator.is_main_process and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Recorded(LoraTrainer):
    def __init__(self, out: Path, **kwargs: Any) -> None:
        self.out = out
        super().__init__(parse(ARGUMENTS), workspace=out, grad_clip=1.0, seed=0, **kwargs)

    def build_hooks(self) -> Any:
        return [*super().build_hooks(), Kill(self.out)]

    def forward(self, batch: Any) -> Any:
        loss, records = super().forward(batch)
        with open(self.out / f"{self.accelerator.process_index}.jsonl", "a") as file:
            file.write(json.dumps([self.step, loss.item(), batch.tolist()]) + "\n")
        return loss, records


if __name__ == "__main__":
    Recorded(Path(sys.argv[1]), max_steps=STEPS, mixed_precision="bf16").train()
