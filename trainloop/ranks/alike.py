"""Checks that all ranks are about to do the same, when this rank is about to do something new.

The phases of a step and the trained parameters decide which collectives the forward and backward pass use. If they
change on some ranks only, the ranks wait for one another in different collectives, and hang. They change rarely, so no
step pays for an exchange without need: a rank on which they have changed sends a control message before its next
window, and waits for the same message from all other ranks.

A rank on which nothing has changed sends none. It goes on into its window, and waits there, perhaps without end. So a
rank that has waited for a second asks the next rank once a second what it is doing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import RankDisagreementError
from . import collectives
from .control import NOT_ALIKE, Control
from .peers import ENDED, IN_WINDOW, Peers, State

_PAUSE_SECONDS = 1.0


def agree(control: Control, peers: Peers, step: int, told: str) -> None:
    """Raise unless every rank tells the same before its window. Call on a rank where something has changed.

    Args:
        control: Of the run.
        peers: Of the run.
        step: Whose window comes next.
        told: What this rank is about to do.

    Raises:
        RankDisagreementError: Another rank tells something else, or has gone on into the window.
    """
    if collectives.world_size() == 1:
        return
    peers.num_agreements += 1
    last_step = control.last_step
    control.start(told, num_epochs_done=control.num_epochs_done)
    with _watch(peers, step, told), peers.doing("waiting for the other ranks to do the same"):
        control.finish(step)
    control.last_step = last_step  # the step has only begun


@contextmanager
def _watch(peers: Peers, step: int, told: str) -> Iterator[None]:
    """Within it, this rank waits for the others. The wait ends when the next one is seen to have gone on."""
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
                # Also ends the wait of this rank.
                peers.tell({collectives.rank(): f"{ENDED} {RankDisagreementError.__name__}: {found[0]}"})
                return

    thread = threading.Thread(target=look, name="alike", daemon=True)
    thread.start()
    try:
        yield
    except collectives.LostContactError:
        if not found:
            raise
        raise RankDisagreementError(found[0]) from None
    finally:
        is_over.set()
