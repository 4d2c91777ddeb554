"""Before the first collective of a run: is every rank there, or has one ended on its way?

A rank that fails in its constructor never joins. The others would wait for it until the timeout of the collectives, and
could not name it. So they don't wait in a collective: they ask the store of the process group, which exists by then.
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
_LONGEST_PAUSE = 0.5  # seconds between two questions
_TOLD = "trainloop/told"
_LAST_SECONDS = 15.0  # that rank 0, if it holds the store, stays at most for the others to read in it
_calls = itertools.count()
_told: list[bool] = []


def await_all() -> None:
    """Return when every rank has called it. Call on every rank; at once in a single process.

    Raises:
        TrainingError: A rank has ended with an exception, which is named.
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
                return  # the collectives that follow fail, and say who waits
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
    except dist.DistError as ex:
        raise TrainingError(
            "The run cannot begin: the store of the process group is gone, and so is the process that held it (rank 0,"
            " or the launcher). Look at the output there."
        ) from ex


def _count_told(store: Any) -> None:
    """Count this rank, once, as one that knows."""
    if not _told:
        _told.append(True)
        store.add(_TOLD, 1)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _tell() -> None:
    """At the end of a process that an exception has ended: leave word in the store, unless another has."""
    exception = getattr(sys, "last_value", None)
    if exception is None or collectives.world_size() == 1:
        return
    rank = collectives.rank()
    text = f"rank {rank} (process {os.getpid()} on {socket.gethostname()}) ended with {type(exception).__name__}"
    with suppress(Exception):  # the store may be gone already
        store = _store()
        if not store.check([_ENDED]):  # a rank that was told of the first one ends as well
            store.set(_ENDED, f"{text}: {exception}".encode())
        _count_told(store)
        deadline = time.monotonic() + _LAST_SECONDS
        holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while holds_store and time.monotonic() < deadline and store.add(_TOLD, 0) < collectives.world_size():
            time.sleep(0.05)


atexit.register(_tell)
