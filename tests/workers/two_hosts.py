"""The script of integrations/, but a rank may die in mid-save: its files are written, the vote is not cast.

Usage: accelerate launch two_hosts.py WORKSPACE MAX_STEPS [RANK STEP]
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import trainloop.checkpoint.save.saving as saving
from integrations.train import Trainer

workspace, max_steps, *death = sys.argv[1:]
trainer = Trainer(int(max_steps), grad_clip=1.0, workspace=workspace, seed=0, timeout=600)
write = saving.write_draft


def write_and_die(*args: Any) -> Any:
    written = write(*args)
    if [str(trainer.accelerator.process_index), str(trainer.step)] == death:
        os.kill(os.getpid(), signal.SIGKILL)
    return written


saving.write_draft = write_and_die
trainer.train()
trainer.accelerator.print(f"finished at step {trainer.step}")
trainer.accelerator.end_training()  # lets go of the process group, which torch else complains of
