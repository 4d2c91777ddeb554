"""Reports a failure: to the other ranks, to the hooks, to the launcher, and in the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ..account.lives import failures_at_same_step, read_lives
from ..errors import TrainingError
from . import collectives, launcher
from .lost_contact import is_lost_contact
from .peers import ENDED

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_MAX_LIVES = 3
"""If so many lives in a row fail at the same step, the run is not restarted."""


@contextmanager
def reported_failure(trainer: BaseTrainer) -> Iterator[None]:
    """Inside this context, an exception is reported before it leaves: to the other ranks, to the launcher, then to
    every hook's `on_exception`.

    If this rank has waited in vain for another, it raises a `TrainingError` that names the other rank. At its end, the
    context drops every request for a stop, a checkpoint or an exit, so that the next `train` doesn't act on it.
    """
    launcher.retract()
    try:
        trainer.peers.open()
        yield
        trainer.peers.close()
    except BaseException as ex:
        trainer.peers.is_ending = True
        reported = _explained(trainer, ex)
        _tell_launcher(trainer, reported)
        for hook in trainer.hooks:
            try:
                hook.on_exception(trainer, reported)
            except Exception as another:  # it must not hide the first exception, or keep that from the other hooks
                trainer.logger.error(f"{type(hook).__name__}.on_exception failed: {another}")
        if reported is ex:
            raise
        raise reported from ex
    finally:
        trainer.control.forget()
        collectives.use_links(None)
        collectives.end_waits_at(None)


def _explained(trainer: BaseTrainer, exception: BaseException) -> BaseException:
    """The exception that leaves `train`. If this rank has lost contact, it names the rank that is gone. If only this
    rank ends, the others are told why, because they can only see that it is gone.
    """
    if collectives.world_size() == 1:
        return exception
    if is_lost_contact(exception):
        resumes = " Start the same command again to continue from the last checkpoint." if trainer.checkpointers else ""
        error = TrainingError(trainer.peers.explain(collectives.timeout(), exception) + resumes)
        error.is_consequence, error.__cause__ = True, exception  # now, because the hooks get it before it is raised
        return error
    if not isinstance(exception, TrainingError | SystemExit):  # these are raised on every rank
        trainer.peers.tell({collectives.rank(): f"{ENDED} {type(exception).__name__}: {exception}"})
    return exception


def _tell_launcher(trainer: BaseTrainer, exception: BaseException) -> None:
    """Report why this rank ends. Prevent a restart if the run was asked to end, or if no restart would help."""
    if trainer.control.agreed["exit_signal"] and isinstance(exception, SystemExit):
        launcher.end_restarts("The run was asked to end")
    elif isinstance(exception, Exception) and trainer.control.last_step is not None and trainer.workspace is not None:
        # `last_step` is the same on every rank. `trainer.step` may differ if a hook fails after a step on one rank.
        num_lives = 1 + _num_lives_failed(trainer.workspace, trainer.control.last_step + 1)
        if num_lives >= _MAX_LIVES:
            exception.add_note(
                f"The run has failed at step {trainer.peers.step} in {num_lives} lives in a row. The cause is not the"
                " machine: look at the code, the data and the memory that this step needs. The run is not restarted"
                " again."
            )
            launcher.end_restarts(f"The run has failed at the same step in {num_lives} lives in a row")
    if isinstance(exception, Exception) or (isinstance(exception, SystemExit) and exception.code):
        step = trainer.peers.step  # an exception takes `trainer.step` back
        launcher.report(exception, f"step {step}" if step else "before the first step")


def _num_lives_failed(workspace: Path, step: int) -> int:
    """How many lives in a row before this one have failed at `step`. A life without a recorded failure ends the row,
    because nobody knows at which step it was killed.
    """
    try:
        before = read_lives(workspace)[:-1]  # without this life
    except OSError:
        return 0
    failed = list(takewhile(lambda life: life.failures, reversed(before)))
    last_step, num_lives = failures_at_same_step(failed[::-1])
    return num_lives if last_step == step else 0
