"""Runs scripts one after another in one launch, each as if it were alone.

Usage: accelerate launch migration.py JSON, a list of [script, argument...]
"""

from __future__ import annotations

import json
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, GradientState


def main() -> None:
    for script, *arguments in json.loads(sys.argv.pop()):
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
