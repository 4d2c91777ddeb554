"""Writes the logged numbers into a file of the workspace, one row per step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..account.metrics import FORMATS, MetricsFile
from ..hook import BaseHook
from ..records import Records, check_records
from .tracking import Guard, numbers_by_name

if TYPE_CHECKING:
    from pathlib import Path

    from ..trainer import BaseTrainer


class MetricsFileHook(BaseHook):
    """Writes every logged number into the workspace, on rank 0: `metrics.jsonl` or `metrics.csv`, one row per step.

    The names are the nested keys, joined: "train/loss". pandas can read the file at any time, also during the run:
    `pd.read_json(file, lines=True)` or `pd.read_csv(file)`. `trainloop plot` draws it.

    Each step appears once, however often the run is killed: a resumed run first cuts off the rows of the steps that it
    will repeat, and an incomplete row. A save makes the rows durable before the checkpoint exists. If the disk fails,
    the error is logged and the rows are written with the next row; training continues.

    A run that begins at step 0 renames the file of an earlier run to `metrics.old.jsonl` or `metrics.old.csv`.

    Args:
        format: "jsonl" or "csv". A CSV file is written again whenever a name is logged for the first time.

    Raises:
        ValueError: `format` is neither of them.
    """

    needs_workspace = True

    def __init__(self, format: str = "jsonl") -> None:
        if format not in FORMATS:
            raise ValueError(f"`format` must be one of {FORMATS}, but is {format!r}.")
        self.format = format
        self._file: MetricsFile | None = None
        self._row: tuple[int, dict[str, int | float]] | None = None  # step and numbers of the current step
        self._waiting: list[tuple[int, dict[str, int | float]]] = []  # rows that could not be written yet
        self._cut_after: int | None = None  # rows of later steps must still be cut off
        self._guard = Guard("The metrics file", "What is logged waits, and is tried again with the next row.")

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do."""
        return [("write metrics into the workspace", "")]

    def on_before_train(self, trainer: BaseTrainer) -> None:
        if trainer.accelerator.is_main_process:
            assert trainer.workspace is not None  # `needs_workspace`
            if self._file is None:
                self._file = MetricsFile(trainer.workspace, self.format)
                if trainer.step == 0:
                    self._guard.attempt(trainer, self._file.set_aside)
            self._cut(trainer)

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._cut(trainer)

    def _cut(self, trainer: BaseTrainer) -> None:
        """Drop the rows of steps that will be repeated."""
        self._cut_after = trainer.step
        self._waiting = [row for row in self._waiting if row[0] <= trainer.step]
        if self._row is not None and self._row[0] > trainer.step:
            self._row = None
        self._flush(trainer)

    def on_log(self, trainer: BaseTrainer, records: Records, dry_run: bool) -> None:
        check_records(records)
        if not trainer.accelerator.is_main_process:
            return
        numbers = numbers_by_name(records)
        if dry_run:
            trainer.logger.info(f"Would write to metrics.{self.format} at step {trainer.step}: {numbers}.")
            return
        if self._row is not None and self._row[0] == trainer.step:
            self._row[1].update(numbers)
        else:
            self._flush(trainer)
            self._row = (trainer.step, numbers)
        if not trainer._feed.is_started:  # before or after the loop, when no event of a step follows
            self._flush(trainer)

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if self._row is not None and self._row[0] < trainer.step:
            self._flush(trainer)

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._flush(trainer)
        if self._file is not None:
            self._guard.attempt(trainer, self._file.sync)

    def on_after_train(self, trainer: BaseTrainer) -> None:
        self._flush(trainer)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        self._flush(trainer)

    def _flush(self, trainer: BaseTrainer) -> None:
        """Write the waiting rows. Rank 0."""
        if self._row is not None:
            self._waiting.append(self._row)
            self._row = None
        if self._file is not None and (self._waiting or self._cut_after is not None):
            self._guard.attempt(trainer, lambda: self._write(trainer))

    def _write(self, trainer: BaseTrainer) -> None:
        file = self._file
        assert file is not None
        if self._cut_after is not None:
            num_rows = file.open(self._cut_after)
            if num_rows:
                trainer.logger.info(
                    f"{file.path}: {num_rows} rows of steps after {self._cut_after} were cut off, since the run does"
                    " those steps again."
                )
            self._cut_after = None
        while self._waiting:
            file.put(*self._waiting[0])
            del self._waiting[0]
