"""A hook that kills a run once, for workers that are started again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from trainloop import BaseHook


class KillOnce(BaseHook):
    """Kills rank 0 with SIGKILL after a step, unless it has done so in an earlier life.

    Args:
        out: Folder for the mark of an earlier life.
        step: The step.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.marker, self.step = out / "killed", step

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == self.step and trainer.accelerator.is_main_process and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
