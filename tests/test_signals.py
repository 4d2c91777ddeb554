"""A signal, whenever it comes and to whichever rank: a last commit and the right exit code, on every rank."""

from __future__ import annotations

import os
import signal

from trainloop.control import REQUESTS, Control


def exchanged(control: Control) -> dict[str, int]:
    control.start(())
    control.finish(1)
    return control.agreed


def test_the_first_of_several_signals_decides() -> None:
    """On one rank: neither a higher number in the same window nor another in a later one takes its place."""
    control = Control()
    control.ask("exit_signal", signal.SIGUSR1)
    control.ask("exit_signal", signal.SIGTERM)
    assert exchanged(control)["exit_signal"] == signal.SIGUSR1
    control.ask("exit_signal", signal.SIGTERM)
    assert exchanged(control)["exit_signal"] == signal.SIGUSR1
    assert control.take("exit_signal") == signal.SIGUSR1
    assert exchanged(control)["exit_signal"] == 0


class Interrupting(dict):  # type: ignore[type-arg]
    """A signal arrives whenever an entry is looked at."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(REQUESTS, 0))
        self.is_armed = True

    def __getitem__(self, key: str) -> int:
        value: int = super().__getitem__(key)
        if self.is_armed and key == REQUESTS[-1]:
            self.is_armed = False
            os.kill(os.getpid(), signal.SIGUSR1)
        return value


def test_a_signal_in_the_middle_of_the_exchange_is_not_lost() -> None:
    """One that arrives when the requests are being read is told with this exchange or with the next."""
    control = Control()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: control.ask("exit_signal", number))
    try:
        control._asked = Interrupting()
        told = [dict(exchanged(control)), dict(exchanged(control))]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told[1]["exit_signal"] == signal.SIGUSR1
