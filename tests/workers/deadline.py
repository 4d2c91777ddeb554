"""A run without end, whose saves take two seconds longer than they do.

Usage: accelerate launch deadline.py WORKSPACE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import trainloop.checkpoint.save.saving as saving
from tests.small import SmallTrainer
from trainloop import CheckpointingHook

write = saving.write_draft


def write_slowly(*args: Any) -> Any:
    time.sleep(2)
    return write(*args)


def forward(trainer: Any, batch: Any) -> Any:
    time.sleep(0.02)
    return trainer.model(batch[0]).pow(2).mean(), {}


saving.write_draft = write_slowly
hook = CheckpointingHook(20, deadline="slurm", async_save=True)
workspace = Path(sys.argv[1])
trainer = SmallTrainer(10**6, workspace=workspace, hooks_=lambda self: [hook], forward_=forward)
rank = trainer.accelerator.process_index
(workspace / f"life.{rank}.{len(list(workspace.glob(f'life.{rank}.*')))}").touch()
try:
    trainer.train()
except SystemExit as ex:
    (workspace / f"code.{rank}").write_text(str(ex.code))
    raise
