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
_LAST_SECONDS = 2.0  # that rank 0, which may hold the store, stays for the others to read in it
_calls = itertools.count()


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
                raise TrainingError(f"The run cannot begin: {ended}. Look at the output there.")
            if time.monotonic() > deadline:
                return  # the collectives that follow fail, and say who waits
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
    except dist.DistError as ex:
        raise TrainingError(
            "The run cannot begin: the store of the process group is gone, and so is the process that held it (rank 0,"
            " or the launcher). Look at the output there."
        ) from ex


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
        if not _store().check([_ENDED]):  # a rank that was told of the first one ends as well
            _store().set(_ENDED, f"{text}: {exception}".encode())
        if rank == 0:
            time.sleep(_LAST_SECONDS)


atexit.register(_tell)
