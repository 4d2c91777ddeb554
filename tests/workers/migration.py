"""Runs scripts one after another in one launch, each as if it were alone.

Usage: accelerate launch migration.py FOLDER JSON, a list of [script, argument...]; FOLDER is where they run.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, GradientState


def main() -> None:
    _, folder, scripts = sys.argv
    os.chdir(folder)
    for script, *arguments in json.loads(scripts):
        sys.argv[:] = [script, *arguments]
        torch.manual_seed(123)  # what a script before has left behind
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ex:
            if ex.code:
                raise
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        AcceleratorState._reset_state()  # and not the process group, which all of them share
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
