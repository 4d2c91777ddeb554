"""Checks that all ranks make the same change before the next window.

The phases of a step and the trained parameters decide which collectives the forward and backward pass use. If they
change only on some ranks, the ranks wait in different collectives, and hang. Changes are rare, so ordinary steps need
no exchange: a rank with a change sends a control message before its next window, and waits for the same message from
all other ranks.

A rank without a change sends no message. It begins its window, and may wait there forever. So while a rank waits for
the message, it asks the next rank once a second what that rank is doing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import RankDisagreementError
from . import collectives
from .control import NOT_ALIKE, Control
from .links import LostContactError
from .peers import ENDED, IN_WINDOW, Peers, State

_PAUSE_SECONDS = 1.0


def agree(control: Control, peers: Peers, step: int, told: str) -> None:
    """Raise unless every rank makes the same change before its window. Call on each rank with a change.

    Args:
        control: The control messages of the run.
        peers: The answers of the other ranks.
        step: The step whose window comes next.
        told: Text for the change. It must be the same on every rank.

    Raises:
        RankDisagreementError: Another rank makes another change, or has begun the window without a change.
    """
    if collectives.world_size() == 1:
        return
    peers.num_agreements += 1
    last_step = control.last_step
    control.start(told, num_epochs_done=control.num_epochs_done)
    with _watch(peers, step, told), peers.doing("waiting for the other ranks to do the same"):
        control.finish(step)
    control.last_step = last_step  # the step is not done yet


@contextmanager
def _watch(peers: Peers, step: int, told: str) -> Iterator[None]:
    """Inside this context, this rank waits for the others. It stops waiting if the next rank has begun its window."""
    is_over, found = threading.Event(), []

    def look() -> None:
        while not is_over.wait(_PAUSE_SECONDS):
            rank, state = peers.ask_next()
            if not isinstance(state, State) or state.num_agreements >= peers.num_agreements:
                continue
            if state.phase == IN_WINDOW and state.step >= step:
                found.append(
                    f"Step {step}: {NOT_ALIKE} (rank {collectives.rank()}: {told}; rank {rank}: goes on as before)."
                )
                # This also ends this rank's own wait.
                peers.tell({collectives.rank(): f"{ENDED} {RankDisagreementError.__name__}: {found[0]}"})
                return

    thread = threading.Thread(target=look, name="alike", daemon=True)
    thread.start()
    try:
        yield
    except LostContactError:
        if not found:
            raise
        raise RankDisagreementError(found[0]) from None
    finally:
        is_over.set()
