"""One rank of a run of which one fails in its constructor, or before `train` is called.

Usage: constructor.py VICTIM PLACE ("accelerator", "constructor" or "script")
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator

from tests.small import SmallTrainer


class Trainer(SmallTrainer):
    def __init__(self, victim: int, place: str) -> None:
        self.victim, self.place = victim, place
        super().__init__(2, timeout=120)
        self.fail("constructor", self.accelerator)

    def build_accelerator(self) -> Accelerator:
        accelerator = super().build_accelerator()
        self.fail("accelerator", accelerator)
        return accelerator

    def fail(self, place: str, accelerator: Any) -> None:
        if place == self.place and accelerator.process_index == self.victim:
            raise ValueError("no such data set")


def main() -> None:
    trainer = Trainer(int(sys.argv[1]), sys.argv[2])
    trainer.fail("script", trainer.accelerator)
    trainer.train()


if __name__ == "__main__":
    main()
