"""The message that the ranks exchange once a window, besides the gradient: one small vector of host integers."""

from __future__ import annotations

import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence

from ..errors import RankDisagreementError
from . import collectives

REQUESTS = ("exit_signal", "stop", "checkpoint", "save_failed", "bad_samples")
"""Requests that any rank may make of all ranks. Values: a signal number, 1 for the other requests, or 0 for nothing."""

DEADLINE = 256 + signal.SIGTERM
"""An exit signal that nobody has sent: the run's time is up. The run exits as after SIGTERM."""

NOT_ALIKE = "`phases` and calls of `set_trainable` must be the same on every rank, at the same step, but are not"

_NOTHING = [0] * len(REQUESTS)


class Control:
    """Requests that any rank makes, and on which all ranks act after the same step.

    `ask` is local, and a signal handler may call it. With `start` and `finish` all ranks learn of the requests.
    `agreed` keeps a request until it was acted on. A single process does the same, so that a run ends at the same step
    at any number of processes.
    """

    def __init__(self) -> None:
        self._asked = dict.fromkeys(REQUESTS, 0)
        self.agreed = dict.fromkeys(REQUESTS, 0)
        self.stopped_by = ""
        """The name of whatever asked for a stop on this rank."""
        self.num_epochs_done = 0
        """Number of epochs that are completed on every rank, at the end of the last window."""
        self.alarms: list[Callable[[], int]] = []
        """Called before every exchange. Each returns an exit signal if the run must exit, else 0."""
        self.last_step: int | None = None
        """The last step in which all ranks have exchanged messages. None: there was none yet."""

    def ask(self, request: str, value: int = 1) -> None:
        """Make a request on this rank. The ranks agree on it with the next exchange. The first value stays: of several
        signals, the first one decides.
        """
        self._asked[request] = self._asked[request] or value

    def ask_to_stop(self, reason: str | None) -> None:
        """Ask for a stop. Without a reason, `who_stopped` returns the name of the caller's caller."""
        self.stopped_by = self.stopped_by or reason or sys._getframe(2).f_code.co_qualname
        self.ask("stop")

    def take(self, request: str) -> int:
        """Return the value that was agreed on, and reset it. 0: nothing was agreed on."""
        value, self.agreed[request] = self.agreed[request], 0
        return value

    def forget(self) -> None:
        """Drop all requests. A request ends with the `train` in which it was made."""
        self._asked = dict.fromkeys(REQUESTS, 0)
        self.agreed = dict.fromkeys(REQUESTS, 0)
        self.stopped_by = ""
        self.alarms.clear()

    def who_stopped(self) -> str:
        """The name of whatever asked for the agreed stop, on any rank. "": there is no stop. Call on every rank."""
        if not self.agreed["stop"]:
            return ""
        return next(filter(None, collectives.gather_objects(self.stopped_by)), "request_stop")

    def start_agreeing_on_exit(self) -> Callable[[], bool]:
        """Start to ask all ranks whether any has received an exit signal. Call on every rank, during long work between
        two windows, so that the run can still end in time.

        Returns:
            A function that waits for the other ranks and returns the answer.
        """
        self._heed_alarms()
        finish = collectives.start_max([self.agreed["exit_signal"] or self._asked["exit_signal"]])

        def agreed() -> bool:
            (self.agreed["exit_signal"],) = finish()
            return bool(self.agreed["exit_signal"])

        return agreed

    def _heed_alarms(self) -> None:
        for alarm in self.alarms:
            if exit_signal := alarm():
                self.ask("exit_signal", exit_signal)

    def start(self, skipped: Sequence[int] | str, checksum: int = 0, num_epochs_done: int = 0) -> None:
        """Send this rank's message, without waiting for the others. Call on every rank once a window, after its work is
        queued: the ranks then exchange their messages while the device computes.

        Args:
            skipped: The draws of the window that gave no loss on this rank. They must be the same on all ranks. Or,
                before a window, the text for a change (see `alike`).
            checksum: Checksum of everything else that must be the same on all ranks.
            num_epochs_done: Number of epochs of its data that this rank has completed.
        """
        self._heed_alarms()
        # The dict is replaced before it is read: a signal may come between any two lines, and must not be lost.
        asked, self._asked = self._asked, dict.fromkeys(REQUESTS, 0)
        values = [asked[request] for request in REQUESTS]
        self._skipped = skipped if isinstance(skipped, str) else list(skipped)
        pattern = zlib.crc32(repr(self._skipped).encode()) if skipped else 0
        self.num_epochs_done = num_epochs_done
        # All ranks have the same number if its maximum and its minimum are equal.
        rest = [pattern, -pattern, checksum, -checksum, -num_epochs_done]
        self._usual = [*_NOTHING, *rest]
        self._finish = collectives.start_max([*values, *rest])

    def finish(self, step: int, explain: Callable[[], None] = lambda: None) -> None:
        """Receive the messages of the others. Call on every rank, after `start`.

        Args:
            step: The step, for the error.
            explain: Called on every rank if the checksums differ. It raises an error that says what differs.

        Raises:
            RankDisagreementError: On every rank. It names the draws that each rank has skipped.
        """
        maxima = self._finish()
        self.last_step = step
        del self._finish  # it may hold the process group, whose threads must end before the interpreter does
        if maxima == self._usual:
            return  # the usual case: no requests, and all ranks agree
        *by_request, pattern, minus_pattern, checksum, minus_checksum, minus_num_epochs = maxima
        self.num_epochs_done = -minus_num_epochs
        if pattern != -minus_pattern:
            skipped = collectives.gather_objects(self._skipped)
            if any(isinstance(one, str) for one in skipped):
                told = "; ".join(f"rank {rank}: {one or 'goes on as before'}" for rank, one in enumerate(skipped))
                raise RankDisagreementError(f"Step {step}: {NOT_ALIKE} ({told}).")
            told = "; ".join(f"rank {rank}: {draws or 'none'}" for rank, draws in enumerate(skipped))
            raise RankDisagreementError(
                f"Step {step}: `forward` returned None for different micro-batches on different ranks (draws of the"
                f" window, from 0: {told}). Return None for the same micro-batch on every rank, or override"
                " `batch_weight` and return 0 for a micro-batch that one rank alone wants to drop."
            )
        if checksum != -minus_checksum:
            explain()
        for request, value in zip(REQUESTS, by_request, strict=True):
            self.agreed[request] = self.agreed[request] or value


def check_main_thread(argument: str) -> None:
    """Raise unless signals can be handled in this thread, as `argument` requires.

    Raises:
        ValueError: This is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"`{argument}` needs `train` to be called in the main thread, since Python handles signals only there. Call"
            f" it in the main thread, or leave `{argument}` out and call `request_stop`."
        )


def exit_cause(exit_signal: int) -> tuple[str, str, int]:
    """Describe an agreed exit signal: the name of the signal ("" for the deadline), a text, and the exit code that a
    shell would use.
    """
    number = exit_signal % 256
    name = "" if exit_signal == DEADLINE else signal.Signals(number).name
    why = "Ctrl-C" if number == signal.SIGINT else f"{name} was received"
    return name, why if name else "The deadline is near", 128 + number


def parse_signals(argument: str, given: Iterable[int | str] | int | str | None) -> list[int]:
    """Convert the value of `argument`, numbers and names of signals, to signal numbers.

    Raises:
        ValueError: There is no such signal.
    """
    if given is None:
        return []
    numbers = []
    for one in [given] if isinstance(given, int | str) else given:
        try:
            numbers.append(int(signal.Signals[one] if isinstance(one, str) else signal.Signals(one)))
        except (KeyError, ValueError) as ex:
            raise ValueError(f"`{argument}` must be signals, by number or name, but one is {one!r}.") from ex
    return numbers
