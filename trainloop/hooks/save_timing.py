"""Saves by time: after a time interval and before the deadline. Also measures what saves cost."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..account.lives import Life, failure_times, read_lives
from ..errors import describe
from ..ranks import collectives
from ..ranks.control import DEADLINE
from .deadline import Deadline, end_time, parse_deadline

if TYPE_CHECKING:
    from ..checkpoint import CheckpointStore
    from ..trainer import BaseTrainer

_PRIOR_SECONDS = 24 * 3600.0
"""Added to the observed time when failures are counted, so that a run without failures has a finite failure rate."""
_NUM_REMEMBERED = 5  # saves whose cost is remembered
_PROBE_BYTES = 2**25
_RETELL = 1.25  # the interval is logged again if it has changed by this factor


def parse_save_every(given: Any) -> timedelta | str | None:
    """Check the argument `save_every`.

    Raises:
        TypeError: It is neither a positive timedelta nor "auto" nor None.
    """
    if given is not None and given != "auto" and (not isinstance(given, timedelta) or given <= timedelta(0)):
        raise TypeError(f'`save_every` must be a positive timedelta, "auto" or None, but is {describe(given)}.')
    return given  # type: ignore[no-any-return]


def best_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """The seconds between two saves that lose the least time. Saves cost time, and a failure loses half an interval on
    average (Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006 refines it).

    Args:
        save_seconds: How long a save blocks the run.
        seconds_between_failures: Mean time between two failures.
    """
    return math.sqrt(2 * save_seconds * seconds_between_failures)


class SaveTiming:
    """Decides on rank 0, by its clock, when to save. The other ranks follow by the control message.

    Args:
        save_every: The argument of `CheckpointingHook`.
        deadline: The argument of `CheckpointingHook`.
    """

    def __init__(self, save_every: Any, deadline: Any) -> None:
        self.save_every, self._given = parse_save_every(save_every), parse_deadline(deadline)
        self.deadline: Deadline | None = None
        self._last_save = time.monotonic()
        self._begun = time.monotonic()
        self._blocked: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._whole: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._store: CheckpointStore | None = None
        self._first_guess = 0.0
        self._num_failures, self._seconds_before = 0, 0.0
        self._told = 0.0

    def begin(self, trainer: BaseTrainer, store: CheckpointStore) -> None:
        """Start when the run begins or resumes. Call on every rank.

        Args:
            trainer: The trainer. It must be restored.
            store: The store that the run is saved to.
        """
        self._last_save, self._begun, self._store = time.monotonic(), time.monotonic(), store
        if collectives.rank() != 0 or (self._given is None and self.save_every != "auto"):
            return
        self._learn(trainer, store.path)
        if self._given is not None:
            self.deadline = Deadline(end_time(self._given), self._save_seconds)
            trainer.control.alarms.append(lambda: DEADLINE if self.deadline and self.deadline.is_near() else 0)
            trainer.logger.info(
                f"The run must end by {datetime.fromtimestamp(self.deadline.end):%Y-%m-%d %H:%M:%S}, in"
                f" {timedelta(seconds=round(self.deadline.seconds_left()))}. The last save is expected to take"
                f" {self._save_seconds():.1f} s."
            )

    def _learn(self, trainer: BaseTrainer, folder: Path) -> None:
        """Learn the cost of saves from earlier processes of the run, or estimate the cost of the first save."""
        lives: list[Life] = []
        if trainer.workspace is not None:
            with suppress(OSError):
                lives = read_lives(trainer.workspace)[:-1]
        self._num_failures = len(failure_times(lives))
        self._seconds_before = sum(life.ended - life.ready for life in lives if life.ready is not None)
        for event in (event for life in lives for event in life.events):
            seconds = float(event.get("seconds", 0.0))
            if event["event"] == "save":
                self._blocked.append(seconds)
            if event["event"] == "durable" or (event["event"] == "save" and event.get("durable")):
                self._whole.append(seconds)
        if not self._whole:
            self._first_guess = 2 * num_bytes(trainer) * seconds_per_byte(folder)

    # ------------------------------------------------------------------ what saves cost

    def save_begins(self) -> None:
        """Note that a save begins. Call on every rank."""
        if self._store is not None and self._store.last_seconds:
            self._whole.append(self._store.last_seconds)  # of the previous save
        self._last_save = time.monotonic()

    def save_returned(self, *, is_durable: bool) -> float:
        """Note that a save has returned. Call on every rank.

        Args:
            is_durable: False: a thread is still writing.

        Returns:
            How many seconds the save has blocked the run.
        """
        seconds = time.monotonic() - self._last_save
        self._blocked.append(seconds)
        if is_durable:
            self._whole.append(seconds)
        if self.deadline is not None:
            self.deadline.skip()
        return seconds

    def _save_seconds(self) -> float:
        """Seconds until the next save is durable, at most. It first waits for a save that is in flight."""
        assert self._store is not None
        longest = max(*self._whole, self._store.last_seconds, 0.0)
        one = 1.25 * longest if longest else max(self._first_guess, *self._blocked, 0.0)
        return 1.0 + one * (2 if self._store.busy() else 1)

    # ------------------------------------------------------------------ when to save

    def is_due(self, trainer: BaseTrainer) -> bool:
        """Whether a save is due, by the clock of rank 0. False on the other ranks."""
        if self.save_every is None or collectives.rank() != 0:
            return False
        if isinstance(self.save_every, timedelta):
            return time.monotonic() - self._last_save >= self.save_every.total_seconds()
        return time.monotonic() - self._last_save >= self._auto(trainer)

    def _auto(self, trainer: BaseTrainer) -> float:
        cost = sum(self._blocked) / len(self._blocked) if self._blocked else self._first_guess
        seconds = self._seconds_before + time.monotonic() - self._begun
        interval = best_interval(cost, (seconds + _PRIOR_SECONDS) / (self._num_failures + 1))
        if not self._told / _RETELL <= interval <= self._told * _RETELL:
            self._told = interval
            trainer.logger.info(
                f"Saving about every {timedelta(seconds=math.ceil(interval))}, which loses the least time: a save"
                f" blocks the run for {cost:.2f} s, and the run failed {self._num_failures} times in"
                f" {seconds / 3600:.1f} hours."
            )
        return interval


def num_bytes(trainer: BaseTrainer) -> int:
    """About how many bytes this rank saves: weights and optimizer state. At least the state of Adam is assumed."""
    weights = sum(map(_local_bytes, trainer.model.parameters()))
    state = [value for param in trainer.optimizer.state.values() for value in param.values()]
    return weights + max(2 * weights, sum(_local_bytes(value) for value in state if isinstance(value, torch.Tensor)))


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def seconds_per_byte(folder: Path) -> float:
    """How long the disk takes per byte, measured with one small file."""
    path, start = folder / f".speed-{os.getpid()}", time.monotonic()
    try:
        with path.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return (time.monotonic() - start) / _PROBE_BYTES
    except OSError:  # the first save will report the cause
        return 0.0
    finally:
        with suppress(OSError):
            path.unlink()
