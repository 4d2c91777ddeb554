"""Keeps a fork from catching a thread of a process group inside the interpreter."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

_MAX_SECONDS = 1.0
"""A fork waits no longer: a thread that has been busy for so long computes, and is not inside the interpreter."""

_THREADS = Path("/proc/self/task")


@functools.cache
def guard_forks() -> None:
    """From now on let each fork of this process wait until the threads of torch's process groups are idle.

    A data loader forks its workers, often right after a collective. The thread that carried the collective out then
    lets go of its tensors. For that it enters the interpreter, under a lock that a forked process inherits as it is.
    Before 3.12, CPython takes the lock in the new process before it makes it anew. If the thread held it, the worker
    hangs for ever, and with it the rank. A thread that sleeps doesn't hold the lock. A collective that ends during the
    fork does no harm: whoever waits for it still holds the tensors.
    """
    if sys.version_info < (3, 12) and _THREADS.exists():
        os.register_at_fork(before=_wait_for_process_groups)


def _wait_for_process_groups() -> None:
    end = time.monotonic() + _MAX_SECONDS
    while any(map(_is_busy, os.listdir(_THREADS))) and time.monotonic() < end:
        time.sleep(0.0002)  # lets go of the interpreter, for which the thread may wait


def _is_busy(thread: str) -> bool:
    try:
        stat = (_THREADS / thread / "stat").read_text()  # "1234 (pt_gloo_runloop) S …"; a name may hold parentheses
    except OSError:
        return False  # it has ended
    name, _, state = stat.partition("(")[2].rpartition(") ")
    return name.startswith("pt_") and state[0] in "RD"
