"""Runs examples/lora.py in bf16. The first life is killed after a step; each rank writes its losses and batches.

Usage: accelerate launch lora.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from examples.lora import LoraTrainer, parse
from tests.workers.killing import KillOnce

ARGUMENTS = ["--interval", "2", "--batch-size", "2", "--rank", "4", "--lr", "1e-2"]
STEPS, KILLED_AT = 6, 5


class Recorded(LoraTrainer):
    def __init__(self, out: Path, **kwargs: Any) -> None:
        self.out = out
        super().__init__(parse(ARGUMENTS), workspace=out, grad_clip=1.0, seed=0, **kwargs)

    def build_hooks(self) -> Any:
        return [*super().build_hooks(), KillOnce(self.out, KILLED_AT)]

    def forward(self, batch: Any) -> Any:
        loss, records = super().forward(batch)
        with open(self.out / f"{self.accelerator.process_index}.jsonl", "a") as file:
            file.write(json.dumps([self.step, loss.item(), batch.tolist()]) + "\n")
        return loss, records


if __name__ == "__main__":
    Recorded(Path(sys.argv[1]), max_steps=STEPS, mixed_precision="bf16").train()
