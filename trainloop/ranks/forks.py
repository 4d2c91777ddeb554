"""Prevents a fork while a thread of a process group is inside the interpreter."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

_MAX_SECONDS = 1.0
"""A fork waits at most this long. A thread that is busy for longer is computing, and not inside the interpreter."""

_THREADS = Path("/proc/self/task")


@functools.cache
def guard_forks() -> None:
    """From now on, make each fork of this process wait until the threads of torch's process groups are idle.

    A data loader forks its workers, often right after a collective. The thread that ran the collective then frees its
    tensors. For that it enters the interpreter, under a lock. A forked process inherits the lock in its current state.
    Before 3.12, CPython acquires the lock in the new process before it resets it. If the thread held it, the worker
    hangs forever, and so does the rank. A sleeping thread doesn't hold the lock. A collective that ends during the fork
    does no harm, because its caller still holds the tensors.
    """
    if sys.version_info < (3, 12) and _THREADS.exists():
        os.register_at_fork(before=_wait_for_process_groups)


def _wait_for_process_groups() -> None:
    end = time.monotonic() + _MAX_SECONDS
    while any(map(_is_busy, os.listdir(_THREADS))) and time.monotonic() < end:
        time.sleep(0.0002)  # releases the interpreter, for which the thread may wait


def _is_busy(thread: str) -> bool:
    try:
        stat = (_THREADS / thread / "stat").read_text()  # "1234 (pt_gloo_runloop) S …"; a name may hold parentheses
    except OSError:
        return False  # it has ended
    name, _, state = stat.partition("(")[2].rpartition(") ")
    return name.startswith("pt_") and state[0] in "RD"
