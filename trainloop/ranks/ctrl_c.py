"""Ctrl-C: the first one ends the run after its step, with a save. The second one ends it at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import terminal

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


@contextmanager
def gentle_ctrl_c(trainer: BaseTrainer) -> Iterator[None]:
    """Within it, the first Ctrl-C asks all ranks to save and exit after the step, as a signal in `exit_signals` does.

    Before the first step is done there is nothing to save, so Ctrl-C raises `KeyboardInterrupt` at once. It always does
    so in an interactive session, such as a notebook. A handler that the script has set is left alone.
    """
    is_ours = threading.current_thread() is threading.main_thread() and not hasattr(sys, "ps1")
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    is_asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal is_asked
        if is_asked or trainer.control.last_step is None:
            signal.default_int_handler(number, frame)
        is_asked = True
        trainer.control.ask("exit_signal", number)
        terminal.show("ending; Ctrl-C again: at once")

    signal.signal(signal.SIGINT, handle)
    try:
        yield
        if is_asked:  # too late for a step to hear of it
            raise KeyboardInterrupt
    finally:
        if signal.getsignal(signal.SIGINT) is handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_if_asked(trainer: BaseTrainer) -> None:
    """End a run that Ctrl-C was agreed on and that no checkpointer has ended. Call on every rank, between steps.

    Raises:
        SystemExit: With a shell's code for SIGINT.
    """
    if trainer.control.agreed["exit_signal"] != signal.SIGINT:
        return
    why = "" if trainer.checkpointers else " Nothing is saved: the run has no CheckpointingHook."
    trainer.logger.warning(f"Ctrl-C: the run ends after step {trainer.step}.{why}")
    raise SystemExit(128 + signal.SIGINT)
