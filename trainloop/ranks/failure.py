"""How a failure is reported: to the other ranks, to the hooks, and to whoever reads the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import TrainingError, check_initialised
from . import collectives
from .peers import ENDED, is_lost_contact

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


@contextmanager
def reported_failure(trainer: BaseTrainer) -> Iterator[None]:
    """Within it, an exception is reported before it leaves: to the other ranks, then to every hook's `on_exception`.

    A rank that waited in vain raises a `TrainingError` that names the rank it waited for. Either way the end of it
    drops every request for a stop, a checkpoint or an exit, so that the next `train` doesn't act on it.
    """
    check_initialised(trainer, ["peers"], "BaseTrainer")
    try:
        trainer.peers.open()
        yield
        trainer.peers.close()
    except BaseException as ex:
        reported = _explained(trainer, ex)
        for hook in trainer.hooks:
            try:
                hook.on_exception(trainer, reported)
            except Exception as another:  # must not hide the first one, nor keep it from the other hooks
                trainer.logger.error(f"{type(hook).__name__}.on_exception failed: {another}")
        if reported is ex:
            raise
        raise reported from ex
    finally:
        trainer.control.forget()


def _explained(trainer: BaseTrainer, exception: BaseException) -> BaseException:
    """The exception that leaves `train`. If this rank lost contact, it says with whom. If only this rank ends, the
    others are told why, because all that they can see is that it is gone.
    """
    if collectives.world_size() == 1:
        return exception
    if is_lost_contact(exception):
        resumes = " Started again, the run goes on from its last checkpoint." if trainer.checkpointers else ""
        explained = TrainingError(trainer.peers.explain(collectives.timeout()) + resumes)
        explained.__cause__ = exception  # the hooks hear of it before it is raised
        return explained
    if not isinstance(exception, TrainingError | SystemExit):  # every rank raises those
        trainer.peers.tell({collectives.rank(): f"{ENDED} {type(exception).__name__}: {exception}"})
    return exception
