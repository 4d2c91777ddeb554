"""Worker processes of a data loader: how they start, how they react to signals, and how they end.

The launcher, Slurm and a terminal send a signal to all processes of a job. A rank that handles the signal saves and
exits. Its workers must live until then; otherwise the rank fails for lack of data before it has saved.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader, get_worker_info


def start_iterator(data: Iterable[Any]) -> Iterator[Any]:
    """`iter(data)`. If it starts workers, these ignore the signals that the rank handles at this time."""
    loader: Any = getattr(data, "base_dataloader", data)  # inside Accelerate's loaders, this one has the workers
    if not isinstance(loader, DataLoader) or not loader.num_workers or not hasattr(signal, "pthread_sigmask"):
        return iter(data)
    numbers = _handled_signals()
    init = loader.worker_init_fn
    loader.worker_init_fn = _WorkerInit(init.then if isinstance(init, _WorkerInit) else init, numbers)
    with _blocked(numbers, loader.multiprocessing_context):
        return iter(data)


def end_workers(iterator: Any) -> None:
    """End the worker processes of a loader's iterator now.

    torch ends them when the iterator is garbage-collected, but the traceback of an exception from a worker keeps the
    iterator alive. torch has no public method for this.
    """
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        for worker in getattr(iterator, "_workers", ()):
            worker.terminate = worker.kill  # for a worker that hangs, because it may ignore SIGTERM
        shutdown()


def has_ready_batch(iterator: Any) -> bool:
    """Whether the workers of a loader's iterator have finished a batch. torch has no public method for this. False: no,
    or unknown, or there are no workers.
    """
    queue = getattr(iterator, "_data_queue", None)
    return queue is not None and not queue.empty()


@dataclass
class WithOwnDataset:
    """A `worker_init_fn` that sets `get_worker_info().dataset` to the user's data set, instead of our wrapper, and then
    runs the user's function. Many set attributes there, for example the part of the data that the worker reads.
    """

    then: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # `info` is frozen
        if self.then is not None:
            self.then(worker_id)


@dataclass
class _WorkerInit:
    """A `worker_init_fn` that makes a worker ignore signals, then runs the user's function. Workers unpickle it."""

    then: Callable[[int], None] | None
    numbers: list[int]

    def __call__(self, worker_id: int) -> None:
        for number in self.numbers:
            # Not SIG_IGN, because programs that a worker starts would inherit it.
            signal.signal(number, _leave_to_the_rank)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)
        if self.then is not None:
            self.then(worker_id)


def _leave_to_the_rank(number: int, frame: Any) -> None:
    pass


def _handled_signals() -> list[int]:
    """The signals for which this process has a Python handler, including the script's own handlers."""
    without = (signal.SIGCHLD, signal.SIGINT if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 0)
    return [int(n) for n in signal.valid_signals() if n not in without and callable(signal.getsignal(n))]


@contextmanager
def _blocked(numbers: list[int], context: Any) -> Iterator[None]:
    """Inside this context, new processes start with the signals blocked, so a signal waits until `_WorkerInit` has run.

    A spawned worker needs seconds until then. The fork server, which starts here too, keeps them blocked for good.
    """
    if (context or multiprocessing).get_start_method() != "fork":
        resource_tracker.ensure_running()  # it would unblock SIGTERM in this process if it started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
