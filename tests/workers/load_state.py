"""A script with Accelerate alone that goes on from `accelerator.load_state`, and writes what it then has.

Usage: accelerate launch load_state.py FOLDER BATCHES OUT
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from tests.workers.foreign import Script


def main() -> None:
    folder, batches, out = sys.argv[1:]
    script = Script(StateDictType.FULL_STATE_DICT if folder.endswith("fsdp2") else None)
    script.accelerator.load_state(folder)
    rng = {"torch": torch.get_rng_state(), "numpy": float(np.random.rand()), "python": random.random()}
    state = copy.deepcopy(script.whole_state())  # it is the live one
    losses = []
    for x in torch.load(batches):
        loss = (script.model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        losses.append(loss.item())
        script.accelerator.backward(loss)
        script.optimizer.step()
        script.lr_scheduler.step()
        script.optimizer.zero_grad()
    if script.accelerator.is_main_process:
        torch.save({**state, "rng": rng}, Path(out) / "state.pt")
        (Path(out) / "losses.json").write_text(json.dumps(losses))
    script.accelerator.wait_for_everyone()
    os._exit(0)  # see foreign.py


if __name__ == "__main__":
    main()
