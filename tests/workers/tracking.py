"""Trains with a hook for an experiment tracker, and ends as it is told to.

Usage: python tracking.py WORKSPACE TRACKER HOW STEP
TRACKER: "wandb", "tensorboard", or the format of a metrics file
HOW, in `on_after_step` of STEP: "never", "kill" (SIGKILL), "raise", "term" (SIGTERM)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from tests.small import SmallTrainer
from trainloop import BaseHook, BaseTrainer, CheckpointingHook, LoggingHook, MetricsFileHook, TrackerHook, WandbHook

LAST_STEP = 30
IMAGES_EVERY, VALIDATE_EVERY, SAVE_EVERY = 3, 4, 5


class Log(BaseHook):
    """Logs images, histograms, texts and something beside the step's means, after the hook that may die in between."""

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step % VALIDATE_EVERY == 0:
            trainer.log({"val": {"twice": torch.tensor(2.0 * trainer.step)}})
        if trainer.step % IMAGES_EVERY == 0:
            trainer.log_images({"samples": {"grey": torch.full((4, 6), trainer.step, dtype=torch.uint8)}})
            trainer.log_histogram({"steps": torch.arange(trainer.step)})
            trainer.log_text({"words": {"of": f"<step> {trainer.step}\n"}})


class End(BaseHook):
    def __init__(self, how: str, step: int) -> None:
        self.how, self.step = how, step

    def on_after_step(self, trainer: BaseTrainer) -> None:
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        if trainer.step == self.step:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "raise":
                raise RuntimeError("as told")
            elif self.how == "term":
                os.kill(os.getpid(), signal.SIGTERM)


def make(workspace: str, tracker: list[BaseHook], how: str = "never", step: int = 0) -> SmallTrainer:
    hooks = [LoggingHook(interval=1), End(how, step), Log(), CheckpointingHook(SAVE_EVERY, exit_signals="SIGTERM")]
    return SmallTrainer(LAST_STEP, workspace=workspace, hooks_=lambda self: [*tracker, *hooks])


if __name__ == "__main__":
    workspace, tracker, how, step = sys.argv[1:]
    hook: Any = TrackerHook("tensorboard") if tracker == "tensorboard" else None
    if tracker in ("jsonl", "csv"):
        hook = MetricsFileHook(tracker)
    if hook is None:
        settings: dict[str, Any] = {}
        if os.environ.get("WANDB_MODE") == "online":
            import wandb

            settings["settings"] = wandb.Settings(x_file_stream_transmit_interval=1)
        hook = WandbHook("a-project", config={"data": {"name": "eight", "folders": ["a", "b"]}}, **settings)
    make(workspace, [hook], how, int(step)).train()
