"""Which ranks live and what they are doing, asked without a collective, for the error of those that wait in vain.

A dead or stuck rank shows in the others as an exception of a collective, which knows an address at best. So each rank
answers over a socket of its own, from a thread that lives as long as its process, and tells the others why it ends.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from . import collectives
from .roll_call import await_all

ENDED = "ended with"
"""The beginning of a status that the rank itself has reported."""

_GAVE_UP = "gave up"
_ANSWER_SECONDS = 3.0  # a living rank answers in milliseconds, also from within a collective
_SEARCH_SECONDS = 10.0  # no longer than this for all ranks together
_NUM_ASKED_AT_ONCE = 64
_MAX_LINE = 2**16
_NUM_NAMED = 3  # ranks that are named with all their particulars
_GLOO = re.compile(r"\[\S+\.(cc|h):\d+\]")
"""How gloo begins its errors, which are plain RuntimeErrors; a script may raise one with the same words."""
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
)

_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def is_lost_contact(exception: BaseException | None) -> bool:
    """Whether a collective failed because another rank is gone or did not come in time."""
    while exception is not None:
        text = str(exception)
        is_gloo = type(exception) is RuntimeError and _GLOO.search(text) is not None
        is_ours = is_gloo and any(lost in text for lost in _LOST)
        if is_ours or (dist.is_available() and isinstance(exception, dist.DistError)):
            return True
        exception = exception.__cause__
    return False


class Address(NamedTuple):
    """Where a rank runs and answers; without `ip` it cannot be asked."""

    host: str
    pid: int
    ip: str
    port: int


class Peers:
    """The other ranks of the run, and what this one tells them when they ask.

    Attributes:
        step: The optimizer step that this rank is in.
    """

    def __init__(self) -> None:
        self.step = 0
        self._phase, self._since = "the start", time.monotonic()
        self._addresses: list[Address] = []
        self._token = ""
        self._statuses: dict[int, str] = {}
        self._server: socket.socket | None = None

    def open(self) -> None:
        """Begin to answer, and learn where the others do. Call on every rank; nothing in a single process."""
        self.close()
        self._statuses = {}
        if collectives.world_size() == 1:
            return
        await_all()
        ip, port = self._listen()
        mine = Address(socket.gethostname(), os.getpid(), ip, port)
        gathered = collectives.gather_objects((mine, secrets.token_hex(8)))
        self._token = gathered[0][1]  # so that only the run's own ranks are answered
        self._addresses = [address for address, _ in gathered]
        if self._server is not None:
            threading.Thread(target=self._serve, args=(self._server,), name="peers", daemon=True).start()

    def close(self) -> None:
        """Answer no longer."""
        server, self._server, self._addresses = self._server, None, []
        if server is not None:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread, as `close` does not
            server.close()

    def enter(self, phase: str) -> None:
        """Note what this rank does from now on. A few hundred nanoseconds: called several times a step."""
        self._phase, self._since = phase, time.monotonic()

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Within it, this rank does `phase`; an exception leaves it standing, to be reported."""
        before = self._phase
        self.enter(phase)
        yield
        self.enter(before)

    def tell(self, statuses: Mapping[int, str]) -> None:
        """Tell the others what became of ranks, by rank ("ended with …"), so that they need not guess. Any rank."""
        this_rank = collectives.rank()
        self._ask(
            [rank for rank in self._askable() if rank == this_rank or rank not in statuses], {"statuses": statuses}
        )

    def explain(self, timeout: timedelta | None) -> str:
        """What to say when a collective has failed, found out in about `_SEARCH_SECONDS` at most. Call on any rank.

        Args:
            timeout: Of the collectives, if it is known.
        """
        waited, phase = time.monotonic() - self._since, self._phase
        intro = f"Step {self.step}: lost contact with other ranks after {waited:.1f} s of {phase}."
        answers: dict[int, Any] = dict(self._statuses)  # a copy: the thread may add to it
        gone = self._gone(answers)
        if not gone:
            answers = {**self._ask(self._askable(), {}), **self._statuses}
            # Who was told of meanwhile went first: a rank that told it may itself have ended before it was asked.
            gone = self._gone(self._statuses) or self._gone(answers)
        # The others must not take this rank for the first that went, when it ends as well.
        self.tell(gone or {collectives.rank(): f"{_GAVE_UP} after {waited:.1f} s of {phase}"})
        if gone:
            is_told = any(status.startswith(ENDED) for status in gone.values())
            where = "the output there" if is_told else "the output there and at the host's kernel log (out of memory?)"
            return f"{intro} {self._named(gone)}. Look at {where}."
        live = {
            rank: status if isinstance(status, str) else _describe_phase(*status) for rank, status in answers.items()
        }
        others = f" The others live: {self._named(live)}." if live else ""
        limit = "`timeout`" if timeout is None else f"`timeout` ({timeout.total_seconds():g} s)"
        return f"{intro}{others} A rank hangs, or needs more time than {limit} gives it."

    @staticmethod
    def _gone(answers: Mapping[int, Any]) -> dict[int, str]:
        """Of what ranks have said, or is said of them: those that did not just wait in vain themselves."""
        statuses = {rank: status for rank, status in answers.items() if isinstance(status, str)}
        return {rank: status for rank, status in statuses.items() if not status.startswith(_GAVE_UP)}

    # ------------------------------------------------------------------ asking

    def _named(self, statuses: Mapping[int, str]) -> str:
        parts = []
        for rank, status in list(statuses.items())[:_NUM_NAMED]:
            place = self._addresses[rank]
            parts.append(f"rank {rank} (process {place.pid} on {place.host}) {status}")
        more = f", and {len(statuses) - _NUM_NAMED} more" if len(statuses) > _NUM_NAMED else ""
        text = "; ".join(parts) + more
        return text[0].upper() + text[1:] if text else text

    def _askable(self) -> list[int]:
        """The other ranks whose address can be reached from here; a loopback address means another host there."""
        this_rank, here = collectives.rank(), socket.gethostname()
        return [
            rank
            for rank, place in enumerate(self._addresses)
            if rank != this_rank and place.ip and (not place.ip.startswith("127.") or place.host == here)
        ]

    def _ask(self, ranks: list[int], request: Mapping[str, Any]) -> dict[int, Any]:
        """The answers by rank: (step, phase, seconds), or what became of it."""
        line = json.dumps({**request, "token": self._token}).encode() + b"\n"
        pool = ThreadPoolExecutor(min(len(ranks), _NUM_ASKED_AT_ONCE) or 1)
        asked = {pool.submit(_ask, self._addresses[rank], line): rank for rank in ranks}
        done, _ = wait(asked, _SEARCH_SECONDS)  # of thousands on hosts that are gone, those asked by then are enough
        pool.shutdown(wait=False, cancel_futures=True)
        return dict(sorted((asked[future], future.result()) for future in done))

    # ------------------------------------------------------------------ answering

    def _listen(self) -> tuple[str, int]:
        """Open the socket, on the interface that leads to the master; without one the rank just cannot be asked."""
        try:
            master = (os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500")))
            family, kind, protocol, _, remote = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as outward:
                outward.connect(remote)  # of a datagram socket: sends nothing, chooses the interface
                ip = outward.getsockname()[0]
            self._server = socket.create_server((ip, 0), family=family)
        except (OSError, ValueError):
            return "", 0
        _listening.add(self._server)
        return ip, self._server.getsockname()[1]

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed
                return
            with connection, suppress(OSError, ValueError, AttributeError):
                connection.settimeout(1.0)
                with connection.makefile("rwb") as file:
                    request = json.loads(file.readline(_MAX_LINE))
                    if request.get("token") != self._token:
                        continue
                    for rank, status in request.get("statuses", {}).items():
                        self._statuses.setdefault(int(rank), str(status))
                    answer = (self.step, self._phase, time.monotonic() - self._since)
                    file.write(json.dumps(answer).encode() + b"\n")


def _describe_phase(step: int, phase: str, seconds: float) -> str:
    return f"has been in step {step}, {phase}, for {seconds:.1f} s"


def _ask(place: Address, line: bytes) -> Any:
    try:
        with socket.create_connection((place.ip, place.port), _ANSWER_SECONDS) as connection:
            connection.sendall(line)
            with connection.makefile("rb") as file:
                answer = file.readline(_MAX_LINE)
        return json.loads(answer) if answer else "is gone"
    except (TimeoutError, ValueError):
        return "does not answer"
    except OSError as ex:
        return "is gone" if isinstance(ex, ConnectionError) else f"cannot be reached ({ex.strerror or ex})"


def _close_in_child() -> None:
    """A worker of a data loader that outlives its rank for a moment must not seem to be it."""
    for server in list(_listening):
        server.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
