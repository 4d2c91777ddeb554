"""Keeps the records of a life while it trains: its events, its ledger, and the audit of the steps that it repeats.

It costs a few microseconds a step, and no communication: the ranks compare results once, after all repeated steps.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..checkpoint.save.writer import library_versions
from ..errors import TrainingError
from ..ranks import collectives
from ..ranks.lost_contact import is_lost_contact
from ..version import __version__
from .audit import Audit, Expected, Result
from .events import EVENTS, EventLog
from .ledger import LEDGER, Ledger, StepBits, read_ledger
from .lives import Life, read_lives, split_runs
from .process import own_start

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_PROGRESS_SECONDS = 30.0
_MAX_DETAIL = 500  # characters of an error's first line
_NO_CAUSES = ("max_steps", "on_resume", "num_workers", "git_is_dirty", "audit/")
"""Prefixes of settings that don't change the computation of a step."""

_ONE = struct.Struct("<d")


class Account:
    """The records of one life of a run. Make it on every rank, after the run is built and its folder is locked.

    Args:
        trainer: The trainer. It must be built. Without a workspace, nothing is recorded.
        keeps_ledger: Whether steps are recorded and compared.
    """

    def __init__(self, trainer: BaseTrainer, *, keeps_ledger: bool = True) -> None:
        self._trainer = trainer
        self._rank, self._world_size = collectives.rank(), collectives.world_size()
        self._is_first = self._rank == 0
        workspace = trainer.workspace
        self._log = EventLog(workspace / EVENTS if workspace is not None else None, trainer.logger)
        self._is_kept = workspace is not None
        self._is_started = self._is_ended = False
        self._reason: tuple[str, str] | None = None
        self._data_seconds = 0.0
        self._last_progress, self._last_step = time.monotonic(), -1
        self._again_until = 0  # the highest step of the earlier lives
        self._lives_before: list[Life] = []
        self._ledger = Ledger(workspace / LEDGER, self._rank) if workspace is not None and keeps_ledger else None
        self._audit: Audit | None = None
        self._num_audited = self._num_differing = 0
        self._audit_until = self._audit_losses_until = self._losses_until = 0
        if self._is_kept:
            self._begin()

    def _begin(self) -> None:
        hosts = collectives.gather_on_first(socket.gethostname())
        if hosts is None:
            self._log.life = collectives.broadcast_object(0)
            return
        before = None
        if self._ledger is not None:
            before = dict(zip(("time", "step"), self._ledger.last_word(), strict=True))
        self._log.cut_torn_line()
        self._log.life = 1 + max((life.number for life in self._lives()), default=0)
        collectives.broadcast_object(self._log.life)
        self._log.write(
            "begin",
            started=own_start(),
            pid=os.getpid(),
            host=socket.gethostname(),
            hosts=dict(Counter(hosts)),
            processes=len(hosts),
            version=__version__,
            versions=library_versions(),
            before=before,
            restart=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def _lives(self) -> list[Life]:
        try:
            return [] if self._log.path is None else read_lives(self._log.path)
        except Exception as ex:  # whatever the file contains, it must not end the run
            self._trainer.logger.warning(f"{self._log.path} cannot be read: {ex!r}")
            return []

    def start(self) -> None:
        """Call when the run is restored, before its loop begins."""
        if self._is_started:
            return
        trainer = self._trainer
        self._is_started, self._last_progress = True, time.monotonic()
        self._write("start", step=trainer.step, max_steps=trainer.max_steps, settings=trainer.settings)
        if self._is_first and (runs := split_runs(self._lives())):
            self._lives_before = runs[-1][:-1]
            done = max((life.step for life in self._lives_before), default=0)
            self._again_until = done if done > trainer.step else 0
            for event in (event for life in self._lives_before for event in life.events if event["event"] == "audit"):
                self._num_audited += int(event["last"]) - int(event["first"]) + 1
                self._num_differing += not event["same"]
        if self._ledger is not None:
            self._start_ledger(self._ledger)

    def _start_ledger(self, ledger: Ledger) -> None:
        """Read the earlier lives' records of the steps to come, and begin to record."""
        step = self._trainer.step
        own = self._lives_before[0].number if self._lives_before else self._log.life
        first_life: int = collectives.broadcast_object(own)
        expected = Expected()
        with self._guarded():
            lives = read_ledger(ledger.path.parent, self._rank)
            expected = Expected.of([life for life in lives if life.first_life == first_life], step)
            ledger.open(self._log.life, first_life, self._world_size, step)
        audit = Audit(expected, self._rank, self._world_size)
        last = collectives.start_max([audit.last_step, audit.last_loss])
        self._audit_until, self._audit_losses_until = last()
        self._audit = audit if self._audit_until else None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Inside this context, a disk error ends the ledger, not the run."""
        try:
            yield
        except OSError as ex:
            self._give_up(ex)

    def _give_up(self, error: OSError) -> None:
        self._ledger = None
        self._trainer.logger.warning(f"The ledger can no longer be written: {error}")

    def after_step(self) -> None:
        """Record a step, after every hook's `on_after_step`. More calls for the same step do nothing."""
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
        if self._ledger is not None or self._audit is not None:
            self._record(step)

    def _record(self, step: int) -> None:
        info = self._trainer.step_info
        position, rates = self._trainer._feed.position_checksum(), _checksum(info.lr)
        if self._ledger is not None:
            try:  # not `_guarded`, which would double the time of this method
                self._ledger.add_step(step, info.grad_norm, position, rates)
            except OSError as ex:
                self._give_up(ex)
        if self._audit is not None:
            self._audit.step(step, StepBits(info.grad_norm, position, rates))
            if step >= self._audit_until and self._losses_until >= self._audit_losses_until:
                self._conclude(collectives.gather_on_first)

    def note_losses(self, first_step: int, losses: Sequence[float]) -> None:
        """Record the losses of consecutive steps. If several hooks read them, the first one counts."""
        for step, loss in enumerate(losses, first_step):
            if step <= self._losses_until:
                continue
            self._losses_until = step
            if self._ledger is not None:
                self._ledger.add_loss(step, loss)
            if self._audit is not None:
                self._audit.loss(step, loss)

    def _conclude(self, gather: Callable[[Result], list[Result] | None]) -> None:
        """Report the result for the repeated steps, once.

        Args:
            gather: Returns the results of all ranks on rank 0, or only this rank's if no collective is allowed.
        """
        audit, self._audit = self._audit, None
        if audit is None:
            return
        by_rank = gather(audit.result())
        if not self._is_first or by_rank is None:
            return
        result = Result.joined(by_rank)
        if not result.last:
            return
        found, is_comparable = result.difference, not result.is_of_other_samples
        level = logging.WARNING if found is not None and is_comparable else logging.INFO
        self._trainer.logger.log(level, result.text(self._changes()))
        where = {"step": found.step, "rank": found.rank, "quantity": found.quantity} if found is not None else {}
        fields: dict[str, Any] = {
            "first": result.first,
            "last": result.last,
            "same": found is None,
            "comparable": is_comparable,
        }
        if result.other_world_size:
            fields |= {"processes_before": result.other_world_size, "deviation": result.deviation}
        self._num_audited += result.last - result.first + 1
        self._num_differing += found is not None and is_comparable
        self._log.write("audit", **fields, **where)

    def _changes(self) -> dict[str, tuple[Any, Any]]:
        """Other differences from the last life."""
        lives = self._lives()[-2:]
        if len(lives) < 2:
            return {}
        before, now = ({"host": ", ".join(sorted(life.hosts)), **life.versions, **life.settings} for life in lives)
        keys = [key for key in before if key in now and not key.startswith(_NO_CAUSES)]
        return {key: (before[key], now[key]) for key in keys if before[key] != now[key]}

    def counts(self) -> dict[str, int]:
        """How many steps of the run were repeated and compared, and how often they differed. On rank 0."""
        return {"audit/steps_done_again": self._num_audited, "audit/differences": self._num_differing}

    def saved(self, seconds: float, is_durable: bool) -> None:
        """Record a save that has returned, after blocking the run for `seconds`. Call on every rank."""
        self._write_with_waits("save", seconds=seconds, durable=is_durable)
        if self._ledger is not None:
            with self._guarded():
                self._ledger.flush()
        if self._trainer.step >= self._audit_until:
            self._conclude(collectives.gather_on_first)

    def durable(self, step: int, seconds: float) -> None:
        """Record that an async save has succeeded, `seconds` after its start."""
        self._write("durable", step=step, seconds=seconds)

    def save_failed(self, step: int, error: BaseException) -> None:
        """Record that a save has failed. The run may continue."""
        self._write("save_failed", step=step, detail=first_line(error))

    def ends_by(self, reason: str, detail: str) -> None:
        """Set the reason for the `SystemExit` that will end this life."""
        self._reason = (reason, detail)

    def end(self, exception: BaseException | None = None, stopped_by: str = "") -> None:
        """Record the end of the life. Call on any rank; only the first call counts.

        Args:
            exception: The exception that leaves `train`, if any.
            stopped_by: The name of whatever stopped the run, if anything.
        """
        if self._is_ended:
            return
        self._is_ended = True
        trainer = self._trainer
        if self._ledger is not None:
            with self._guarded():
                self._ledger.close()
        self._conclude(collectives.gather_on_first if exception is None else lambda own: [own])
        if exception is None:
            reason = ("stopped", stopped_by) if stopped_by else ("complete", "")
        elif isinstance(exception, KeyboardInterrupt):
            reason = ("signal", "SIGINT")
        elif isinstance(exception, SystemExit):
            reason = self._reason or ("error", f"SystemExit: {exception.code}")
        else:
            reason = ("error", f"{type(exception).__name__}: {first_line(exception)}")
            # A TrainingError is raised on every rank, so one rank records it.
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


def _checksum(rates: Sequence[Any]) -> int:
    """Checksum of learning rates. A tensor on an accelerator counts as 0, because reading it would be a sync."""
    if len(rates) == 1 and type(rates[0]) is float:
        return zlib.crc32(_ONE.pack(rates[0]))
    far = [getattr(getattr(rate, "device", None), "type", "cpu") != "cpu" for rate in rates]
    numbers = [0.0 if is_far else float(rate) for rate, is_far in zip(rates, far, strict=True)]
    return zlib.crc32(struct.pack(f"<{len(numbers)}d", *numbers))
