"""Runs examples/gan.py for two epochs. The first life is killed in the second epoch; each rank writes its losses.

Usage: accelerate launch gan.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from examples.gan import GanTrainer
from tests.workers.killing import KillOnce

EPOCHS, FIRST_END, LAST_STEP, KILLED_AT = 2, 29, 57, 33


class Recorded(GanTrainer):
    def __init__(self, out: Path) -> None:
        self.out = out
        super().__init__(max_epochs=EPOCHS, workspace=out, seed=0)

    def build_hooks(self) -> Any:
        return [*super().build_hooks(), KillOnce(self.out, KILLED_AT)]

    def forward(self, batch: Any) -> Any:
        loss, records = super().forward(batch)
        with open(self.out / f"{self.accelerator.process_index}.jsonl", "a") as file:
            file.write(json.dumps([self.step, self.phase, loss.item()]) + "\n")
        return loss, records


if __name__ == "__main__":
    Recorded(Path(sys.argv[1])).train()
