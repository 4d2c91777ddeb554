"""Trains with and without garbage collection in step, and writes after which steps each rank has collected.

Usage: accelerate launch garbage.py OUT
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.small import SmallTrainer
from trainloop import BaseHook, BaseTrainer

STEPS, INTERVAL = 12, 5


class Cycle:
    """Garbage that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


class Watch(BaseHook):
    """Takes note of collections from the end of the first step to the end of the last. Makes much garbage, on each rank
    another amount.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.step = 0

    def note_collection(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and self.step:
            self.steps.append(self.step)

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.step = trainer.step
        for _ in range(400 * (1 + trainer.accelerator.process_index)):
            Cycle()


class StopError(Exception):
    pass


def collections(gc_interval: int | None, fails: bool = False) -> dict[str, Any]:
    watch = Watch()

    def forward(trainer: SmallTrainer, batch: Any) -> Any:
        if fails and trainer.step == STEPS - 1:
            raise StopError
        return trainer.model(batch[0]).pow(2).mean(), {}

    trainer = SmallTrainer(STEPS, gc_interval=gc_interval, hooks_=lambda self: [watch], forward_=forward)
    gc.callbacks.append(watch.note_collection)
    try:
        trainer.train()
    except StopError:
        assert fails
    gc.callbacks.remove(watch.note_collection)
    return {"steps": watch.steps, "after": [gc.isenabled(), gc.get_freeze_count() > 1000]}


def main() -> None:
    rank = SmallTrainer(0).accelerator.process_index
    results = {
        "in step": collections(INTERVAL),
        "failed": collections(INTERVAL, fails=True),
        "python": collections(None),
    }
    gc.disable()
    results["off"] = collections(INTERVAL)
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
