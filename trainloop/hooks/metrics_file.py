"""Writes the logged numbers into a file of the workspace, one row per step; histograms and texts beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..account.metrics import FORMATS, MetricsFile, ObjectsFile
from ..histograms import flatten_histograms, flatten_texts, to_histogram
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

    `trainer.log_histogram` and `trainer.log_text` add lines to `histograms.jsonl` and `texts.jsonl` in the same way.

    A run that begins at step 0 renames the files of an earlier run to `metrics.old.jsonl` and so on.

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
        self._files: _Files | None = None
        self._row: tuple[int, dict[str, int | float]] | None = None  # step and numbers of the current step
        self._waiting: list[tuple[int, Callable[[_Files], None]]] = []  # steps, and the writes to be done
        self._cut_after: int | None = None  # rows of later steps must still be cut off
        self._guard = Guard("The metrics file", "What is logged waits, and is tried again with the next row.")

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do."""
        return [("write metrics into the workspace", "")]

    def on_before_train(self, trainer: BaseTrainer) -> None:
        if trainer.accelerator.is_main_process:
            assert trainer.workspace is not None  # `needs_workspace`
            if self._files is None:
                self._files = _Files(trainer.workspace, self.format)
                if trainer.step == 0:
                    self._guard.attempt(trainer, self._files.set_aside)
            self._cut(trainer)

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._cut(trainer)

    def _cut(self, trainer: BaseTrainer) -> None:
        """Drop the rows of steps that will be repeated."""
        self._cut_after = trainer.step
        self._waiting = [waiting for waiting in self._waiting if waiting[0] <= trainer.step]
        if self._row is not None and self._row[0] > trainer.step:
            self._row = None
        self._flush(trainer)

    # ------------------------------------------------------------------ what is logged

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

    def on_log_histogram(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        flat = flatten_histograms(records)
        if trainer.accelerator.is_main_process:
            histograms = {"/".join(path): to_histogram("/".join(path), value) for path, value in flat.items()}
            lines = {name: asdict(histogram) for name, histogram in histograms.items()}
            self._put_objects(trainer, lines, "histograms", dry_run)

    def on_log_text(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        flat = flatten_texts(records)
        if trainer.accelerator.is_main_process:
            lines = {"/".join(path): {"text": text} for path, text in flat.items()}
            self._put_objects(trainer, lines, "texts", dry_run)

    def _put_objects(self, trainer: BaseTrainer, lines: dict[str, dict[str, Any]], kind: str, dry_run: bool) -> None:
        if dry_run:
            names = ", ".join(lines)
            trainer.logger.info(f"Would write to {kind}.jsonl at step {trainer.step}: {names}.")
            return
        step = trainer.step

        def put(files: _Files) -> None:
            while lines:
                name, fields = next(iter(lines.items()))
                files.objects[kind].put(step, name, fields)
                del lines[name]

        self._waiting.append((step, put))
        self._write_waiting(trainer)

    # ------------------------------------------------------------------ the disk

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if self._row is not None and self._row[0] < trainer.step:
            self._flush(trainer)

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._flush(trainer)
        if self._files is not None:
            self._guard.attempt(trainer, self._files.sync)

    def on_after_train(self, trainer: BaseTrainer) -> None:
        self._flush(trainer)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        self._flush(trainer)

    def _flush(self, trainer: BaseTrainer) -> None:
        """Write the row of the current step, and everything that waits. Does nothing on other ranks than 0."""
        if self._row is not None:
            step, numbers = self._row
            self._waiting.append((step, lambda files: files.metrics.put(step, numbers)))
            self._row = None
        self._write_waiting(trainer)

    def _write_waiting(self, trainer: BaseTrainer) -> None:
        if self._files is not None and (self._waiting or self._cut_after is not None):
            self._guard.attempt(trainer, lambda: self._write(trainer))

    def _write(self, trainer: BaseTrainer) -> None:
        files = self._files
        assert files is not None
        if self._cut_after is not None:
            num_rows = files.open(self._cut_after)
            if num_rows:
                trainer.logger.info(
                    f"{files.metrics.path}: {num_rows} rows after step {self._cut_after} were removed, because the run"
                    " repeats those steps."
                )
            self._cut_after = None
        while self._waiting:
            self._waiting[0][1](files)
            del self._waiting[0]


class _Files:
    """All files of a workspace that the hook writes."""

    def __init__(self, workspace: Path, format: str) -> None:
        self.metrics = MetricsFile(workspace, format)
        self.objects = {name: ObjectsFile(workspace / f"{name}.jsonl") for name in ("histograms", "texts")}

    def set_aside(self) -> None:
        self.metrics.set_aside()
        for file in self.objects.values():
            file.set_aside()

    def open(self, step: int) -> int:
        """Cut off the lines of later steps. Returns how many rows of metrics were cut off."""
        for file in self.objects.values():
            file.open(step)
        return self.metrics.open(step)

    def sync(self) -> None:
        self.metrics.sync()
        for file in self.objects.values():
            file.sync()
