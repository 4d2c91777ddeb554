"""Lets the launcher restart a run: each attempt uses its own part of the launcher's store.

torch gives every attempt the same keys in the same store ("We create a new TCPStore for every retry", says
`_create_c10d_store`, but `accelerate launch` keeps one). The ranks of a second attempt then read the addresses of the
first, and wait for processes that are gone (pytorch#135712). A canary test reports when torch fixes this.

The launchers of several machines each count their own restarts, so their count can't identify the attempt. Instead,
rank 0 opens a round in the store, the others register in it, and rank 0 closes it with a list of the registered ranks.
A process that is not in the list waits for the next round.
"""

from __future__ import annotations

import importlib
import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

import torch.distributed as dist

from ..errors import TrainingError

_ROUND = "trainloop/round"
_AT_LEAST = timedelta(minutes=10)
"""The minimum time that a rank waits for the others to start: a launcher may first have to end a rank that hangs."""
_LONGEST_PAUSE = 0.5  # seconds between two checks


def join_round(store: Any, rank: int, world_size: int, timeout: timedelta) -> Any:
    """Meet the other ranks of this attempt. Call on every rank, before there is a process group.

    Args:
        store: The launcher's store, which outlives the attempts.
        rank: The rank of this process.
        world_size: Number of ranks.
        timeout: How long to wait for the others.

    Returns:
        The part of `store` that only these processes use.

    Raises:
        TrainingError: Some rank did not come in time.
    """
    pause, deadline = 0.01, time.monotonic() + timeout.total_seconds()
    token = secrets.token_hex(8)  # identifies this call: an earlier process of this rank may have registered and died
    number = store.add(_ROUND, 1) if rank == 0 else 0
    while not _is_complete(store, number, rank, world_size, token):
        if time.monotonic() > deadline:
            raise TrainingError(_late(store, number, rank, world_size, timeout))
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
        if rank != 0 and number != (current := store.add(_ROUND, 0)):
            number = current  # rank 0 has started again
            store.set(_place(number, rank), token)
    return dist.PrefixStore(f"{_ROUND}/{number}", store)  # type: ignore[attr-defined]  # documented, not exported


def _is_complete(store: Any, number: int, rank: int, world_size: int, token: str) -> bool:
    """Whether all ranks have met in this round, including this process. Rank 0 closes the round."""
    if rank != 0:
        closed = f"{_ROUND}/{number}/members"
        return bool(number and store.check([closed]) and token in store.get(closed).decode().split(","))
    places = [_place(number, other) for other in range(1, world_size)]
    if not store.check(places):
        return False
    store.set(f"{_ROUND}/{number}/members", ",".join(found.decode() for found in store.multi_get(places)))
    return True


def _place(number: int, rank: int) -> str:
    return f"{_ROUND}/{number}/rank/{rank}"


def _late(store: Any, number: int, rank: int, world_size: int, timeout: timedelta) -> str:
    missing = "rank 0"
    if rank == 0:
        ranks = [str(other) for other in range(1, world_size) if not store.check([_place(number, other)])]
        missing = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:8])}{', …' if len(ranks) > 8 else ''}"
    return (
        f"The run cannot begin: rank {rank} has waited {timeout.total_seconds():g} s for {missing}. Look at the output"
        " of the launchers on the other machines: one may have ended, or have no restarts left."
    )


def _by_rounds(create_store: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch's `_create_c10d_store`, so that each attempt gets its own keys in the launcher's store."""

    @wraps(create_store)
    def create(hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, *args: Any, **kw: Any) -> Any:
        store = create_store(hostname, port, rank, world_size, timeout, *args, **kw)
        is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and [
            hostname,
            str(port),
            str(world_size),
        ] == [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")]
        # Also in the first attempt, because a launcher on another machine may already have restarted.
        if is_launchers and world_size > 1:
            store = join_round(store, rank, world_size, max(timeout, _AT_LEAST))
        return store

    return create


def install() -> None:
    """From now on, all process groups of this process are made in this way: by a trainer, or by an `Accelerator` or
    `PartialState` of the script.
    """
    if dist.is_available():
        torchs: Any = importlib.import_module("torch.distributed.rendezvous")  # a function of the same name hides it
        create_store = getattr(torchs, "_create_c10d_store", None)
        if create_store is not None and not hasattr(create_store, "__wrapped__"):
            torchs._create_c10d_store = _by_rounds(create_store)
