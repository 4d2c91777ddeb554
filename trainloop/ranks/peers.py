"""Asks which ranks live and what they are doing, without a collective, for the error of ranks that wait in vain.

If a rank is dead or stuck, a collective raises on the others, and its exception contains an address at best. So each
rank answers questions over a separate socket, from a thread that lives as long as its process. When a rank ends, it
tells the others why.

    a rank loses contact ─► asks the first living rank, the leader, to search
    the leader           ─► asks every rank what it is doing, and tells every rank what it has found

So the number of questions is proportional to the number of ranks, however many of them lose contact at once.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

from .. import terminal
from . import collectives, launcher
from .links import connect
from .lost_contact import has_timed_out
from .roll_call import await_all
from .sockets import address_of, listen

ENDED = "ended with"
"""The start of a status that the rank itself has reported."""

_NO_ANSWERS = _IS_GONE, _IS_SILENT = "is gone", "does not answer"
_HANGS = "has been in step"
IN_WINDOW = "forward and backward"
_ANSWER_SECONDS = 3.0  # a living rank answers in milliseconds, also from within a collective
_ASK_SECONDS = 10.0  # limit for asking all ranks
_SETTLE_SECONDS = 5.0  # within this time, the ranks reach the timeout of the same collective
_SEARCH_SECONDS = _SETTLE_SECONDS + 2 * _ASK_SECONDS  # after this time, a rank assumes that its leader is lost
_PAUSE_SECONDS = 0.3
_NUM_LEADERS = 3  # ranks that are asked in turn to search, before a rank searches itself
_NUM_ASKED_AT_ONCE = 64
_MAX_LINE = 2**20
_STUCK_SECONDS = 20.0  # time for a rank to notice that the others are gone
_NUM_NAMED = 3  # ranks that are named with all details
_LOGGER = logging.getLogger("trainloop")


class Address(NamedTuple):
    """The address at which a rank answers. Without `ip` it cannot be asked."""

    host: str
    pid: int
    ip: str
    port: int


class State(NamedTuple):
    """A rank's answer: its step and phase, and the seconds in them. A rank that `gave_up` has lost contact."""

    step: int
    phase: str
    seconds: float
    gave_up: bool
    num_agreements: int

    def __str__(self) -> str:
        return f"{_HANGS} {self.step}, {self.phase}, for {self.seconds:.1f} s"


class Peers:
    """The other ranks of the run, and this rank's answers to them.

    Attributes:
        step: The optimizer step that this rank is in.
        gone: The ranks that `explain` has found to be gone.
        is_ending: Whether this rank has noticed that it fails as well.
        num_agreements: How often this rank has called `alike.agree`.
    """

    def __init__(self) -> None:
        self.step = self.num_agreements = 0
        self._phase, self._since = "the start", time.monotonic()
        self._addresses: list[Address] = []
        self._token = ""
        self._server: socket.socket | None = None
        self._forget()

    def _forget(self) -> None:
        self.gone: set[int] = set()
        self.is_ending = False
        self._statuses: dict[int, str] = {}
        self._told_by: list[int] = []
        self._gave_up, self._has_timed_out, self._searches = False, False, False
        self._has_heard = threading.Event()

    def open(self) -> None:
        """Begin to answer, and learn the others' addresses. Call on every rank. Does nothing in a single process."""
        self.close()
        self._forget()
        if collectives.world_size() == 1:
            return
        await_all()
        self._server, for_links = listen(), listen()
        mine = Address(socket.gethostname(), os.getpid(), *address_of(self._server))
        gathered = collectives.gather_objects((mine, secrets.token_hex(8), address_of(for_links)))
        self._token = gathered[0][1]  # so that only the run's own ranks are answered
        self._addresses = [address for address, *_ in gathered]
        collectives.end_waits_at(self._has_heard)
        self._connect(for_links, [address for *_, address in gathered])
        if self._server is not None:
            threading.Thread(target=self._serve, args=(self._server,), name="peers", daemon=True).start()

    def _connect(self, server: socket.socket | None, addresses: list[tuple[str, int]]) -> None:
        """Connect the ranks for the message of each step, either all of them or none."""
        this_rank, is_lost = collectives.rank(), collectives.contact_is_lost
        links = connect(server, addresses, this_rank, self._token, collectives.timeout, is_lost)
        if any(collectives.start_max([links is None])()):
            if links is not None:
                links.close()
            links = None
            if this_rank == 0:
                _LOGGER.warning(
                    "The ranks cannot connect to each other on the interface that leads to the master. They exchange"
                    " the message of each step over gloo, which is slower."
                )
        collectives.use_links(links)

    def close(self) -> None:
        """Stop answering."""
        server, self._server, self._addresses = self._server, None, []
        if server is not None:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread; `close` alone doesn't
            server.close()

    def enter(self, phase: str) -> None:
        """Record what this rank is doing from now on. Takes a few hundred nanoseconds; called several times a step."""
        self._phase, self._since = phase, time.monotonic()

    @property
    def is_first_left(self) -> bool:
        """Whether this is the first rank that is not gone, as far as it knows."""
        return collectives.rank() == min(set(range(collectives.world_size())) - self.gone)

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Inside this context, this rank is doing `phase`. After an exception `phase` stays, so that it is reported."""
        before = self._phase
        self.enter(phase)
        yield
        self.enter(before)

    def tell(self, statuses: Mapping[int, str]) -> None:
        """Tell all ranks what happened to some ranks ("ended with …"), so that they need not ask. Call on any rank."""
        ranks = [rank for rank in self._askable() if statuses.get(rank) not in _NO_ANSWERS]
        self._ask(ranks, {"told": statuses, "by": collectives.rank()})
        self._hear(statuses)  # last, because this rank may end as soon as it has heard

    def explain(self, timeout: timedelta | None, exception: BaseException) -> str:
        """The error message for a failed collective. Finding the cause takes up to half a minute. Call on any rank.

        Args:
            timeout: Timeout of the collectives, if known.
            exception: The exception of the collective.
        """
        waited, phase = time.monotonic() - self._since, self._phase
        self._gave_up = True
        self._await_search(has_timed_out(exception))
        intro = f"Step {self.step}: lost contact with other ranks after {waited:.1f} s of {phase}."
        limit = "`timeout`" if timeout is None else f"`timeout` ({timeout.total_seconds():g} s)"
        found = dict(sorted(self._statuses.items()))  # a copy, because the thread may add to it
        self.gone = set(found)
        if not found:
            return (
                f"{intro} Every rank that answers waits for the others: the network between them may have failed, or"
                f" {limit} is too short."
            )
        if all(status.startswith(_HANGS) for status in found.values()):
            one = "It hangs, or needs" if len(found) == 1 else "They hang, or need"
            return f"{intro} {self._named(found)}, and the others wait. {one} more time than {limit} gives."
        is_told = any(status.startswith(ENDED) for status in found.values())
        where = "the output there" if is_told else "the output there and at the host's kernel log (out of memory?)"
        return f"{intro} {self._named(found)}. Look at {where}."

    # ------------------------------------------------------------------ searching

    def _await_search(self, has_timed_out: bool) -> None:
        """Let the first rank that answers search for the ranks that the others wait for. Return after its report."""
        askable = self._askable()
        for leader in range(min(len(self._addresses), _NUM_LEADERS)):
            if self._has_heard.is_set():
                return
            if leader == collectives.rank():
                self._begin_search(has_timed_out)
            elif leader not in askable or isinstance(
                self._ask([leader], {"search": has_timed_out}).get(leader, _IS_GONE), str
            ):
                continue
            if self._has_heard.wait(_SEARCH_SECONDS):
                return
        self._begin_search(has_timed_out)
        self._has_heard.wait(_SEARCH_SECONDS)

    def _begin_search(self, has_timed_out: bool) -> None:
        """Search in a thread, once. If more ranks ask for a search in the meantime, they wait for the same one."""
        self._has_timed_out |= has_timed_out
        if not self._searches:
            self._searches = True
            threading.Thread(target=lambda: self.tell(self._search()), name="search", daemon=True).start()

    def _search(self) -> dict[int, str]:
        """Status of the ranks that the others wait for, by rank. Empty: all ranks wait, or the cause is unknown."""
        this_rank = collectives.rank()
        searched, end = [this_rank, *self._askable()], time.monotonic() + _SETTLE_SECONDS
        while True:
            answers = self._ask([rank for rank in searched if rank != this_rank], {})
            if this_rank in searched:
                answers[this_rank] = self._state()
            gone = {rank: answer for rank, answer in answers.items() if answer == _IS_GONE}
            if gone or self._statuses:  # another rank may have reported in the meantime
                return gone
            # A rank that lost contact was waiting. After a while, only the ranks that the others wait for remain.
            answers = {
                rank: answer for rank, answer in answers.items() if isinstance(answer, str) or not answer.gave_up
            }
            searched = list(answers)
            if not searched or time.monotonic() > end:
                break
            time.sleep(_PAUSE_SECONDS)
        if not self._has_timed_out:  # a connection broke, so ranks that still wait have done nothing wrong
            answers = {rank: got for rank, got in answers.items() if isinstance(got, str)}
        is_verdict = 2 * len(answers) <= len(self._addresses)  # otherwise it is more likely that this rank is cut off
        return {rank: str(answer) for rank, answer in answers.items()} if is_verdict else {}

    def _hear(self, statuses: Mapping[Any, str]) -> None:
        """Record the status of ranks. The first report of a rank stays, because later ones are consequences."""
        for rank, status in statuses.items():
            self._statuses.setdefault(int(rank), str(status))
        self._has_heard.set()

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
        """The other ranks whose address can be reached from here. A loopback address works only on the same host."""
        this_rank, here = collectives.rank(), socket.gethostname()
        return [
            rank
            for rank, place in enumerate(self._addresses)
            if rank != this_rank and place.ip and (not place.ip.startswith("127.") or place.host == here)
        ]

    def ask_next(self) -> tuple[int, State | str]:
        """The next rank, and its answer. The cost doesn't grow with the number of ranks."""
        rank = (collectives.rank() + 1) % collectives.world_size()
        return rank, self._ask([rank], {}).get(rank, _IS_SILENT) if rank in self._askable() else _IS_SILENT

    def _ask(self, ranks: list[int], request: Mapping[str, Any]) -> dict[int, State | str]:
        """The answers by rank: the state of a rank, or a text if it didn't answer."""
        line = json.dumps({**request, "token": self._token}).encode() + b"\n"
        pool = ThreadPoolExecutor(min(len(ranks), _NUM_ASKED_AT_ONCE) or 1)
        asked = {pool.submit(_ask, self._addresses[rank], line): rank for rank in ranks}
        done, _ = wait(asked, _ASK_SECONDS)  # if thousands of ranks are gone, it is enough to find some of them
        pool.shutdown(wait=False, cancel_futures=True)
        return dict(sorted((asked[future], future.result()) for future in done))

    # ------------------------------------------------------------------ answering

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
                    if "told" in request:
                        self._told_by.append(int(request["by"]))
                        if len(self._told_by) == 1:
                            threading.Thread(
                                target=self._end_if_stuck, args=(server,), name="stuck", daemon=True
                            ).start()
                        self._hear(request["told"])
                    if "search" in request:
                        self._begin_search(bool(request["search"]))
                    file.write(json.dumps(self._state()).encode() + b"\n")

    def _state(self) -> State:
        return State(self.step, self._phase, time.monotonic() - self._since, self._gave_up, self.num_agreements)

    def _end_if_stuck(self, server: socket.socket) -> None:
        """End this process if it doesn't notice that the run is over. Its launcher only notices processes that have
        ended, and can't restart the run before.

        The others have reported that they end. While one of them lives, it may still finish a save that needs this one.
        """
        noticed_at: float | None = None
        while not self.is_ending and self._server is server:
            time.sleep(_STUCK_SECONDS / 4)
            if any(answer != _IS_GONE for answer in self._ask(self._told_by[:_NUM_NAMED], {}).values()):
                noticed_at = None
            elif noticed_at is None:
                noticed_at = time.monotonic()
            elif time.monotonic() - noticed_at > _STUCK_SECONDS and not self.is_ending:
                stuck = f"Stuck in {self._phase} for {time.monotonic() - self._since:.0f} s"
                text = f"{stuck}: {self._named(self._statuses)}. This process ends so that the run can be restarted."
                launcher.write(text, text, f"step {self.step}", is_first=not self._statuses)
                terminal.close()
                print(f"Rank {collectives.rank()}, step {self.step}: {text}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)


def _ask(place: Address, line: bytes) -> State | str:
    try:
        with socket.create_connection((place.ip, place.port), _ANSWER_SECONDS) as connection:
            connection.sendall(line)
            with connection.makefile("rb") as file:
                answer = file.readline(_MAX_LINE)
        return State(*json.loads(answer)) if answer else _IS_GONE
    except (TimeoutError, ValueError, TypeError):
        return _IS_SILENT
    except OSError as ex:
        return _IS_GONE if isinstance(ex, ConnectionError) else f"cannot be reached ({ex.strerror or ex})"
