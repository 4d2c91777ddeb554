"""Checks before the first collective of a run that every rank is there, and that none has already ended.

A rank that fails in its constructor never joins. The others would wait for it until the timeout of the collectives, and
could not name it. So they don't wait in a collective. They poll the store of the process group, which already exists.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from ..errors import TrainingError
from . import collectives

_ENDED = "trainloop/ended"
_LONGEST_PAUSE = 0.5  # seconds between two checks
_TOLD = "trainloop/told"
_LAST_SECONDS = 15.0  # if rank 0 holds the store, it stays at most this long, so that the others can read it
_calls = itertools.count()
_told: list[bool] = []


def await_all() -> None:
    """Return when every rank has called this. Call on every rank. Returns at once in a single process.

    Raises:
        TrainingError: A rank has ended with an exception. The message names it.
    """
    if collectives.world_size() == 1:
        return
    key, limit, pause = f"trainloop/arrived/{next(_calls)}", collectives.timeout(), 0.01
    deadline = time.monotonic() + (limit.total_seconds() if limit is not None else 0.0)
    try:
        store = _store()
        store.add(key, 1)
        while store.add(key, 0) < collectives.world_size():
            if store.check([_ENDED]):
                ended = store.get(_ENDED).decode()
                _count_told(store)
                error = TrainingError(f"The run cannot begin: {ended}. Look at the output there.")
                error.is_consequence = True
                raise error
            if time.monotonic() > deadline:
                return  # the next collectives will fail, and report who waits
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
    except dist.DistError as ex:
        raise TrainingError(
            "The run cannot begin: the store of the process group is gone, and so is the process that held it (rank 0,"
            " or the launcher). Look at the output there."
        ) from ex


def _count_told(store: Any) -> None:
    """Count this rank, once, as one that has read the message."""
    if not _told:
        _told.append(True)
        store.add(_TOLD, 1)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _tell() -> None:
    """When an exception ends this process, leave a message in the store, unless another rank has."""
    exception = getattr(sys, "last_value", None)
    if exception is None or collectives.world_size() == 1:
        return
    rank = collectives.rank()
    text = f"rank {rank} (process {os.getpid()} on {socket.gethostname()}) ended with {type(exception).__name__}"
    with suppress(Exception):  # the store may be gone already
        store = _store()
        if not store.check([_ENDED]):  # a rank that has read the first message ends too
            store.set(_ENDED, f"{text}: {exception}".encode())
        _count_told(store)
        deadline = time.monotonic() + _LAST_SECONDS
        holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while holds_store and time.monotonic() < deadline and store.add(_TOLD, 0) < collectives.world_size():
            time.sleep(0.05)


atexit.register(_tell)
