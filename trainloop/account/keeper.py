"""Keeps the account of a life: writes its events, on rank 0, while it trains. Costs the step a few additions."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..ranks import collectives
from ..ranks.lost_contact import is_lost_contact
from ..version import __version__
from .events import EVENTS, EventLog
from .lives import Life, read_lives, split_runs
from .process import process_start

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_PROGRESS_SECONDS = 30.0
_MAX_DETAIL = 500  # characters of an error's first line


class Account:
    """The account of one life of a run. Make it on every rank, when the run is built and its folder is taken.

    Args:
        trainer: The trainer; it is built. Without a workspace, nothing is kept.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._is_first = collectives.rank() == 0
        path = trainer.workspace / EVENTS if trainer.workspace is not None else None
        self._log = EventLog(path, trainer.logger)
        self._is_started = self._is_ended = False
        self._reason: tuple[str, str] | None = None
        self._data_seconds = 0.0
        self._last_progress, self._last_step = time.monotonic(), -1
        self._again_until = 0  # the highest step of the lives before
        if path is not None:
            self._begin()

    def _begin(self) -> None:
        hosts: list[str] = collectives.gather_objects(socket.gethostname())
        if not self._is_first:
            self._log.life = collectives.broadcast_object(0)
            return
        self._log.end_torn_line()
        self._log.life = 1 + max((life.number for life in self._lives()), default=0)
        collectives.broadcast_object(self._log.life)
        self._log.write(
            "begin",
            started=process_start(),
            pid=os.getpid(),
            host=socket.gethostname(),
            hosts=dict(Counter(hosts)),
            processes=len(hosts),
            version=__version__,
            restart=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def _lives(self) -> list[Life]:
        try:
            return [] if self._log.path is None else read_lives(self._log.path)
        except OSError:
            return []

    def start(self) -> None:
        """The run is restored, and its loop begins."""
        if self._is_started:
            return
        trainer = self._trainer
        self._is_started, self._last_progress = True, time.monotonic()
        self._write("start", step=trainer.step, max_steps=trainer.max_steps, settings=trainer.settings)
        if self._is_first and (runs := split_runs(self._lives())):
            done = max((life.step for life in runs[-1][:-1]), default=0)
            self._again_until = done if done > trainer.step else 0

    def after_step(self) -> None:
        """A step is over, and every hook has heard of it. Further calls for the same step do nothing."""
        if self._trainer.step == self._last_step:
            return
        self._last_step = self._trainer.step
        info, step = self._trainer.step_info, self._trainer.step
        self._data_seconds += info.data_time
        if info.evaluation_time:
            self._write("evaluation", step=step, seconds=info.evaluation_time)
        if info.non_finite_grad_retry_count or info.overflow_count:
            counts = {"retries": info.non_finite_grad_retry_count, "overflows": info.overflow_count}
            self._write("discarded", step=step, **counts)
        if step == self._again_until:
            self._write_with_waits("again")
        elif time.monotonic() - self._last_progress >= _PROGRESS_SECONDS:
            self._write_with_waits("progress")

    def saved(self, step: int, seconds: float, is_durable: bool) -> None:
        """A save has returned, and has blocked the run for `seconds`."""
        self._write("save", step=step, seconds=seconds, durable=is_durable)

    def durable(self, step: int, seconds: float) -> None:
        """An async save has succeeded, `seconds` after its start."""
        self._write("durable", step=step, seconds=seconds)

    def save_failed(self, step: int, error: BaseException) -> None:
        """A save has failed, and the run may go on."""
        self._write("save_failed", step=step, detail=first_line(error))

    def ends_by(self, reason: str, detail: str) -> None:
        """Why the `SystemExit` comes that will end this life."""
        self._reason = (reason, detail)

    def end(self, exception: BaseException | None = None, stopped_by: str = "") -> None:
        """The life ends. Call on any rank; the first call counts.

        Args:
            exception: That leaves `train`; None: there is none.
            stopped_by: Who has stopped the run, if anybody.
        """
        if self._is_ended:
            return
        self._is_ended = True
        trainer = self._trainer
        if exception is None:
            reason = ("stopped", stopped_by) if stopped_by else ("complete", "")
        elif isinstance(exception, KeyboardInterrupt):
            reason = ("signal", "SIGINT")
        elif isinstance(exception, SystemExit):
            reason = self._reason or ("error", f"SystemExit: {exception.code}")
        else:
            reason = ("error", f"{type(exception).__name__}: {first_line(exception)}")
            # Every rank raises a TrainingError alike.
            if trainer.peers.is_first_left or not isinstance(exception, TrainingError):
                self._log.write(
                    "failed",
                    step=trainer.peers.step or trainer.step,
                    rank=collectives.rank(),
                    error=type(exception).__name__,
                    detail=first_line(exception),
                    lost_contact=is_lost_contact(exception),
                )
        self._write_with_waits("end", reason=reason[0], detail=reason[1])

    def _write(self, event: str, **fields: Any) -> None:
        if self._is_first:
            self._log.write(event, **fields)

    def _write_with_waits(self, event: str, **fields: Any) -> None:
        self._write(event, step=self._trainer.step, data_seconds=self._data_seconds, **fields)
        self._data_seconds, self._last_progress = 0.0, time.monotonic()


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "")[:_MAX_DETAIL]
