"""Which ranks live and what they are doing, asked without a collective, for the error of those that wait in vain.

A dead or stuck rank shows in the others as an exception of a collective, which knows an address at best. So each rank
answers over a socket of its own, from a thread that lives as long as its process, and tells the others why it ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

from . import collectives, launcher
from .roll_call import await_all

ENDED = "ended with"
"""The beginning of a status that the rank itself has reported."""

_GAVE_UP = "gave up"
_ANSWER_SECONDS = 3.0  # a living rank answers in milliseconds, also from within a collective
_SEARCH_SECONDS = 10.0  # no longer than this for all ranks together
_NUM_ASKED_AT_ONCE = 64
_MAX_LINE = 2**16
_STUCK_SECONDS = 20.0  # that a rank may need to notice that the others are gone
_NUM_NAMED = 3  # ranks that are named with all their particulars
_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


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
        gone: The ranks that `explain` has found to be gone.
        is_ending: This rank has failed as well, and knows it.
    """

    def __init__(self) -> None:
        self.step = 0
        self.gone: set[int] = set()
        self.is_ending = False
        self._phase, self._since = "the start", time.monotonic()
        self._addresses: list[Address] = []
        self._token = ""
        self._statuses: dict[int, str] = {}
        self._told_by: list[int] = []
        self._server: socket.socket | None = None

    def open(self) -> None:
        """Begin to answer, and learn where the others do. Call on every rank; nothing in a single process."""
        self.close()
        self._statuses, self._told_by, self.gone, self.is_ending = {}, [], set(), False
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

    @property
    def is_first_left(self) -> bool:
        """Whether this is the first rank that is not gone, as far as it knows."""
        return collectives.rank() == min(set(range(collectives.world_size())) - self.gone)

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
            [rank for rank in self._askable() if rank == this_rank or rank not in statuses],
            {"statuses": statuses, "by": this_rank},
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
        self.gone = set(gone)
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
                    if "by" in request:
                        if not self._told_by:
                            threading.Thread(
                                target=self._end_if_stuck, args=(server,), name="stuck", daemon=True
                            ).start()
                        self._told_by.append(int(request["by"]))
                    for rank, status in request.get("statuses", {}).items():
                        self._statuses.setdefault(int(rank), str(status))
                    answer = (self.step, self._phase, time.monotonic() - self._since)
                    file.write(json.dumps(answer).encode() + b"\n")

    def _end_if_stuck(self, server: socket.socket) -> None:
        """End this process if it doesn't notice that the run is over: its launcher sees only processes that have ended,
        and cannot restart the run before.

        The others have told that they end. As long as one of them lives, it may finish a save that needs this rank.
        """
        noticed_at: float | None = None
        while not self.is_ending and self._server is server:
            time.sleep(_STUCK_SECONDS / 4)
            if any(answer != "is gone" for answer in self._ask(self._told_by[:_NUM_NAMED], {}).values()):
                noticed_at = None
            elif noticed_at is None:
                noticed_at = time.monotonic()
            elif time.monotonic() - noticed_at > _STUCK_SECONDS and not self.is_ending:
                stuck = f"Stuck in {self._phase} for {time.monotonic() - self._since:.0f} s"
                text = (
                    f"{stuck}: {self._named(self._statuses)}. This process is ended, so that the run can be restarted."
                )
                launcher.write(text, text, f"step {self.step}", is_first=not self._gone(self._statuses))
                print(f"Rank {collectives.rank()}, step {self.step}: {text}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)


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
