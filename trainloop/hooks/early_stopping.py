"""Stops a run that no longer improves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import check_int, describe
from ..hook import BaseHook
from ..records import Records, flatten_nested_dict
from .metrics import is_misnamed, list_names

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class EarlyStoppingHook(BaseHook):
    """Stops the run when a logged metric has not improved `patience` times in a row.

    All ranks stop after the same step, with a last checkpoint; see `BaseTrainer.request_stop`. NaN counts as no
    improvement. The best value and the number of misses survive a resume.

    Args:
        metric: Name of the logged metric, with nested keys joined: "val/loss".
        patience: The run stops after this many values in a row without improvement.
        mode: Whether lower ("min") or higher ("max") values are better.
        min_delta: An improvement must be larger than this.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self, metric: str, patience: int = 3, mode: Literal["min", "max"] = "min", min_delta: float = 0.0
    ) -> None:
        if not isinstance(metric, str) or not metric:
            raise ValueError(f'`metric` must be the name of what is logged, as "val/loss", but is {metric!r}.')
        check_int("patience", patience, 1)
        if mode not in ("min", "max"):
            raise ValueError(f'`mode` must be "min" or "max", but is {mode!r}.')
        if isinstance(min_delta, bool) or not isinstance(min_delta, int | float):
            raise TypeError(f"`min_delta` must be a number, but is {describe(min_delta)}.")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"`min_delta` must be finite and at least 0, but is {min_delta}.")
        self.metric = metric
        self.patience = patience
        self.mode = mode
        self.min_delta = min_delta
        self.best: float | None = None
        self.num_bad = 0
        """Number of values in a row that did not improve on `best`."""
        self._is_stopping = self._has_warned = False
        self._others: set[str] = set()

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do: state is saved under the metric's name."""
        return [(f"stop the run by {self.metric!r}", "metric")]

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self._is_stopping = False

    def on_log(self, trainer: BaseTrainer, records: Records, dry_run: bool) -> None:
        if dry_run:
            return
        flat = {"/".join(map(str, key)): value for key, value in flatten_nested_dict(records).items()}
        if self.metric not in flat:
            self._others |= flat.keys()
            is_new = self.best is None and not self.num_bad and not self._has_warned
            if is_new and is_misnamed(trainer, self.metric, self._others):
                self._warn(trainer)
            return
        value = float(flat[self.metric])
        if self._is_better(value):
            self.best, self.num_bad = value, 0
            return
        self.num_bad += 1
        if self.num_bad >= self.patience and not self._is_stopping:
            self._is_stopping = True
            trainer.logger.info(
                f"Step {trainer.step}: {self.metric} is {value:.6g}. For {self.num_bad} times in a row it was no better"
                f" than {'nothing' if self.best is None else f'{self.best:.6g}'}, so the run ends with step"
                f" {self._last_step(trainer)}."
            )
            trainer.request_stop(f"EarlyStoppingHook ({self.metric} no better {self.num_bad} times in a row)")

    def _last_step(self, trainer: BaseTrainer) -> int:
        """The ranks agree on a stop once in each step. If they have done so in this one, another step follows."""
        has_agreed = trainer.control.last_step == trainer.step
        return max(1, trainer.step + (has_agreed and not trainer.is_finished))

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def on_after_train(self, trainer: BaseTrainer) -> None:
        if self.best is None and not self.num_bad and not self._has_warned:
            self._warn(trainer)

    def _warn(self, trainer: BaseTrainer) -> None:
        self._has_warned = True
        trainer.logger.warning(
            f"Step {trainer.step}: EarlyStoppingHook found no metric {self.metric!r}, so it cannot stop the run."
            f" Logged so far: {list_names(self._others)}."
        )

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        state_dict[f"early_stopping_{self.metric}"] = {"best": self.best, "num_bad": self.num_bad}

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        state = state_dict.get(f"early_stopping_{self.metric}")
        if state is not None:
            self.best, self.num_bad = state["best"], state["num_bad"]
