"""A fork doesn't catch a thread of a process group inside the interpreter, where it may hold a lock (CPython 3.11)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching import on_ranks
from trainloop.ranks import collectives, forks

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 12) or not sys.platform.startswith("linux"), reason="CPython 3.12 forks safely"
)

COMPUTE = 20_000
"""Rounds of a hash: some milliseconds outside the interpreter."""


def busy_thread(name: str, is_over: Callable[[], bool]) -> threading.Thread:
    """Start a thread that the system knows by `name` and that computes, mostly outside the interpreter."""
    started = threading.Event()

    def work() -> None:
        ctypes.CDLL(None).prctl(15, name.encode())  # PR_SET_NAME
        started.set()
        while not is_over():
            hashlib.pbkdf2_hmac("sha256", b"", b"", COMPUTE)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait()
    return thread


def fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def test_a_fork_waits_for_threads_of_process_groups_alone(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        collectives.host_group()
        forks._MAX_SECONDS = 60
        rounds = iter(range(5))
        gloo = busy_thread("pt_gloo_runloop", lambda: next(rounds, None) is None)
        fork()
        # It is idle before the process forks. It may still have to leave the interpreter, which it waits for asleep.
        assert next(rounds, None) is None, "the fork didn't wait"
        gloo.join()

        release = threading.Event()
        busy_thread("somebody", release.is_set)
        fork()  # it would wait for a minute, and the rank would be told to hang
        forks._MAX_SECONDS = 0.05
        busy_thread("pt_gloo_runloop", release.is_set)
        fork()
        release.set()

    assert on_ranks(2, tmp_path, run) == [0, 0]
