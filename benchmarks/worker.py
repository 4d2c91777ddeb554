"""Trains one task with one system, in a process of its own: `python -m benchmarks.worker`, started by the harness."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from contextlib import nullcontext
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import torch

from .host_reads import HostReads
from .tasks import Task
from .turns import TurnTakingData

SYSTEMS = {
    "bare torch": "bare_torch",
    "bare Accelerate": "bare_accelerate",
    "trainloop": "ours",
    "Lightning": "with_lightning",
    "transformers Trainer": "with_transformers",
    "pytorch-accelerated": "with_pytorch_accelerated",
    "Ignite": "with_ignite",
}
"""The file of each system: its `train(task, data, **options)` returns the trained model; a `DEALS_SAMPLES` says that
single samples are dealt to the ranks, and not batches."""


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the peers have to say about a loader without workers, and the like
    task = Task(**request["task"])
    rank = int(os.environ.get("RANK", "0"))
    system = importlib.import_module(f"benchmarks.systems.{SYSTEMS[request['system']]}")
    with Client(request["address"], authkey=bytes.fromhex(request["key"])) as harness:
        harness.send((request["number"], rank))
        reads = HostReads()
        folder = Path(request["folder"])
        deals_samples = getattr(system, "DEALS_SAMPLES", False)
        data = TurnTakingData(task, harness, lambda: reads.count, folder / f"{request['number']}", deals_samples)
        with reads if task.counts_host_reads else nullcontext():
            model = system.train(task, data, **request["options"])
        state = {name: whole(value.detach()).cpu().clone() for name, value in model.state_dict().items()}
        torch.save(state, folder / f"{request['number']}_{rank}.pt")
        harness.send(None)
        harness.recv()  # leaves when all have: some frameworks end their process group at exit
    os._exit(0)  # neither what atexit does nor a process group's end belongs to what is measured


def whole(tensor: Any) -> Any:
    """All of a tensor that is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    main()
