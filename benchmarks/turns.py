"""How a training loop is made to wait for its turn without being touched: its data set does the waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .tasks import Task, batch_size, make_data


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class TurnTakingData(Dataset[Any]):
    """The task's samples, which every system reads through a `DataLoader`. Where a turn is over it tells the harness
    what the turn has cost, and blocks until it may go on.

    A loader that runs ahead by some batches has its turns shifted by as many, which changes no difference.

    Args:
        task: What is trained.
        harness: Its end of the pipe.
        host_reads: What the number of host reads so far is.
        folder: For what a system writes; the same one for all ranks.
        deals_samples: The system deals samples to the ranks, not batches: they are put into such an order that each
            rank gets the same batches nevertheless.
    """

    def __init__(
        self, task: Task, harness: Connection, host_reads: Callable[[], int], folder: Path, deals_samples: bool
    ) -> None:
        self.folder = folder
        self._x, self._y = make_data(task)
        if deals_samples:
            order = torch.arange(len(self._x)).view(-1, task.world_size, batch_size(task)).mT.flatten()
            self._x, self._y = self._x[order], self._y[order]
        self._task, self._harness, self._host_reads = task, harness, host_reads
        self._num_fetched = 0

    def __len__(self) -> int:
        return len(self._x)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A whole micro-batch at once, as torch's loader asks for it if a data set can."""
        if self._num_fetched % self._task.batches_a_turn == 0 and self._num_fetched <= self._last:
            self._wait_for_turn()
        self._num_fetched += 1
        return self._x[indices], self._y[indices]

    @property
    def _last(self) -> int:
        return self._task.batches_a_turn * self._task.num_turns

    def _wait_for_turn(self) -> None:
        if self._task.device == "cuda":
            torch.cuda.synchronize()  # a turn ends when the device has done its work
        cpu, wall = time.process_time(), time.perf_counter()
        message = {"cpu": cpu, "host_reads": self._host_reads(), "resident": resident_bytes()}
        if self._task.device == "cuda":
            message["device_memory"] = torch.cuda.max_memory_allocated()
        if self._num_fetched:
            message |= {"turn_cpu": cpu - self._cpu, "turn_wall": wall - self._wall}
        self._harness.send(message)
        self._harness.recv()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def loader_arguments(self) -> dict[str, Any]:
        """What every system gives its `DataLoader` for these samples."""
        arguments = {"batch_size": batch_size(self._task), "shuffle": False, "collate_fn": as_it_is}
        return arguments | ({"pin_memory": True} if self._task.device == "cuda" else {})

    def loader(self, **more: Any) -> DataLoader[Any]:
        """The loader, for one process or for a framework that shards it."""
        return DataLoader(self, **(self.loader_arguments() | more))


def as_it_is(batch: Any) -> Any:
    return batch
