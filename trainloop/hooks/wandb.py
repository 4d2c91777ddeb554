"""Weights & Biases: a run stays one W&B run, with each step once, however often it is killed."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import describe
from ..histograms import flatten_histograms, flatten_texts, to_histogram
from ..hook import BaseHook, CheckpointerHook
from ..images import flatten_images, to_pil
from ..records import Records, check_records
from .tracker_forms import wandb_objects
from .tracking import Guard, arguments_of, launch_of, numbers_by_name, on_rank_zero, read_config
from .wandb_files import STEP, last_step_of
from .wandb_run_file import find_killed_run, note_run

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_STATE_KEY = "wandb"
_FORMATS = ("png", "jpg", "jpeg", "bmp")
_NUM_RECENT = 500  # rows that are kept; a killed wandb process loses its last 15 s, or a buffer of 32 KiB


@dataclass(slots=True)
class _Row:
    """The data that was logged during one step."""

    step: int
    numbers: dict[str, int | float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """The paths where wandb has stored the images that were sent."""
    images: dict[str, Any] = field(default_factory=dict)
    """The images to send, as `wandb.Image`."""
    histograms: dict[str, list[Any]] = field(default_factory=dict)
    """Counts of the bins, and their edges."""
    texts: dict[str, str] = field(default_factory=dict)
    is_sent: bool = False


class WandbHook(BaseHook):
    """Logs to Weights & Biases, on rank 0: numbers under names like "train/loss", images, histograms, texts,
    and the config.

    Everything that is logged during a step becomes one row of the W&B run, with its `trainer/step`, the x axis of all
    charts. The row is sent when the step is over.

    A resumed run continues the same W&B run, whose id is in the checkpoint. (The workspace's `wandb-run.json` has the
    id too, for a run that is killed before its first checkpoint; remove the file to begin a new run.) A step that W&B
    already has is not logged again when it is repeated, because its numbers are the same. Up to 500 rows that W&B lost
    with the killed process are sent again from the checkpoint (with their images if wandb's folder still exists). So
    each step appears exactly once. To branch off from a checkpoint instead, pass another `id`, or set `WANDB_RUN_ID`.

    An exception marks the run as failed; `CheckpointingHook`'s exit after a signal marks it as preempting. An error of
    W&B during the run is logged, and the data is sent later; training continues.

    Args:
        project: W&B's project. None: `WANDB_PROJECT`, or wandb's default.
        config: The run's config: a mapping, or the path of a JSON file. None: the trainer's own arguments, world size,
            strategy, device and versions.
        tags: Tags of the run. None: `WANDB_TAGS`, or none.
        image_format: "png", "jpg", "jpeg" or "bmp".
        **wandb_kwargs: More arguments of `wandb.init`. As there, an argument overrides its environment variable. `dir`
            is the trainer's workspace by default, unless `WANDB_DIR` is set.

    Raises:
        ImportError: wandb is not installed.
        TypeError: An argument has the wrong type, or `wandb.init` has no such argument.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        project: str | None,
        config: Any = None,
        tags: Sequence[str] | None = None,
        image_format: str = "png",
        **wandb_kwargs: Any,
    ) -> None:
        _check_arguments(project, tags, image_format, wandb_kwargs)
        self.config = read_config(config)
        self.image_format = image_format
        given = {"project": project, "tags": list(tags) if tags is not None else None}
        self._arguments = {**{name: value for name, value in given.items() if value is not None}, **wandb_kwargs}
        self.run: Any = None
        """The `wandb.Run` on rank 0 during the run; else None."""
        self._run_id: str | None = None  # of the current run, or of the run to continue
        self._row: _Row | None = None  # of the current step
        self._recent: deque[_Row] = deque(maxlen=_NUM_RECENT)  # rows of completed steps
        self._last_step = -1  # the last step that W&B had when this process continued the run
        self._is_started = self._is_in_step = self._is_over = self._can_resume = False
        self._exit_code = 0
        self._is_complete = False  # whether this process has finished the run and sent everything
        self._guard = Guard(
            "W&B", f"The records of the newest {_NUM_RECENT} steps are kept and sent again at the next interval."
        )

    # ------------------------------------------------------------------ the run

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do: the run's id is saved under one name."""
        return [("log to W&B", "")]

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self._is_started = self._is_in_step = self._is_over = False
        self._can_resume = any(isinstance(hook, CheckpointerHook) for hook in trainer.hooks)

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if not self._is_started:  # not earlier: the checkpoint brings the id, after `on_before_train`
            self._start(trainer)
        self._is_in_step = True
        if self._row is not None and self._row.step < trainer.step:
            self._flush(trainer)

    def on_after_train(self, trainer: BaseTrainer) -> None:
        if not self._is_started:
            self._start(trainer)
        self._is_in_step = False
        self._finish(trainer, 0)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        if self._is_in_step and self._can_resume:
            self._row = None  # it may be incomplete; the resumed run logs it again
        code = exception.code if isinstance(exception, SystemExit) else 1
        is_preempted = isinstance(exception, SystemExit) and bool(trainer.control.agreed["exit_signal"])
        self._finish(trainer, code if isinstance(code, int) else int(code is not None), is_preempted)

    def _start(self, trainer: BaseTrainer) -> None:
        """Call on every rank, so that all ranks know the id, or that the start has failed."""
        if trainer.dry_run:
            return

        def work() -> str | None:
            self._last_step = self._open(trainer)
            return self._run_id

        self._run_id = on_rank_zero(work, "WandbHook could not start its run")
        self._is_started = True

    def _open(self, trainer: BaseTrainer) -> int:
        """Begin the W&B run, or continue it. Rank 0.

        Returns:
            The last step that W&B has of the run. -1: none.
        """
        import wandb

        config = self.config if self.config is not None else arguments_of(trainer)
        if self._run_id is None and self._can_resume and trainer.workspace is not None:
            self._run_id = find_killed_run(trainer.workspace, config, trainer.logger)
        known_id = self._run_id
        launch = {} if self.config is not None else {"launch": launch_of(trainer)}
        arguments: dict[str, Any] = {"config": {**config, **launch}, **self._arguments}
        if known_id is not None:
            if not self._is_told("id", "WANDB_RUN_ID"):
                arguments["id"] = known_id
            if not any(self._is_told(name) for name in ("resume", "resume_from", "fork_from")):
                arguments["resume"] = "allow"
        if trainer.workspace is not None:
            trainer.workspace.mkdir(parents=True, exist_ok=True)
            if not self._is_told("dir"):
                arguments["dir"] = str(trainer.workspace)
        self.run = run = wandb.init(**arguments)
        if run.disabled:
            return -1
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        self._run_id = run.id
        if trainer.workspace is not None:
            note_run(trainer.workspace, run.id, config)
        if run.id != known_id:
            return -1
        if self._is_complete:  # not read from the file, because wandb may still be writing it
            self._is_complete = False
            return max((row.step for row in self._recent), default=-1)
        last_step = last_step_of(run)
        for row in self._recent:
            row.is_sent = row.is_sent and row.step <= last_step
        trainer.logger.info(
            f"Continuing W&B run {run.id}, which has "
            + (f"the steps up to {last_step}." if last_step >= 0 else "no steps yet.")
        )
        return last_step

    def _is_told(self, name: str, variable: str = "") -> bool:
        """Whether an argument of `wandb.init` is set, by the user or the environment."""
        return name in self._arguments or bool(os.environ.get(variable or f"WANDB_{name.upper()}"))

    def _finish(self, trainer: BaseTrainer, exit_code: int, is_preempted: bool = False) -> None:
        self._is_over = True
        self._exit_code = exit_code
        if self.run is None:
            return
        self._flush(trainer, at_once=True)
        unsent = [row.step for row in self._recent if not row.is_sent]
        if unsent:
            trainer.logger.error(f"W&B did not recover. Everything logged since step {unsent[0]} is missing there.")
        run, self.run = self.run, None
        try:
            if is_preempted:
                run.mark_preempting()
            run.finish(exit_code=exit_code)
            if not run.disabled and trainer.workspace is not None:
                note_run(trainer.workspace, run.id, None)
            self._is_complete = not unsent
        except Exception as ex:
            trainer.logger.error(f"The W&B run could not be finished. {type(ex).__name__}: {ex}")

    # ------------------------------------------------------------------ what is logged

    def on_log(self, trainer: BaseTrainer, records: Records, dry_run: bool) -> None:
        check_records(records)
        if trainer.accelerator.is_main_process:
            numbers = numbers_by_name(records)
            if dry_run:
                trainer.logger.info(f"Would log to W&B at step {trainer.step}: {numbers}.")
            elif not self._is_known(trainer.step):
                self._row_of(trainer).numbers.update(numbers)
                self._send_late(trainer)

    def on_log_images(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        images = flatten_images(records)
        if trainer.accelerator.is_main_process and (dry_run or not self._is_known(trainer.step)):
            pictures = {"/".join(path): to_pil("/".join(path), image) for path, image in images.items()}
            if dry_run:
                sizes = ", ".join(f"{key} ({picture.width} x {picture.height})" for key, picture in pictures.items())
                trainer.logger.info(f"Would log images to W&B at step {trainer.step}: {sizes}.")
                return

            def work() -> None:
                from wandb import Image

                new = {key: Image(picture, file_type=self.image_format) for key, picture in pictures.items()}
                self._row_of(trainer).images.update(new)

            self._guard.attempt(trainer, work)  # `Image` writes a file
            self._send_late(trainer)

    def on_log_histogram(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        flat = flatten_histograms(records)
        if trainer.accelerator.is_main_process and (dry_run or not self._is_known(trainer.step)):
            histograms = {"/".join(path): to_histogram("/".join(path), value) for path, value in flat.items()}
            if dry_run:
                trainer.logger.info(f"Would log histograms to W&B at step {trainer.step}: {', '.join(histograms)}.")
                return
            new = {name: [histogram.counts, histogram.edges] for name, histogram in histograms.items()}
            self._row_of(trainer).histograms.update(new)
            self._send_late(trainer)

    def on_log_text(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        texts = {"/".join(path): text for path, text in flatten_texts(records).items()}
        if trainer.accelerator.is_main_process and (dry_run or not self._is_known(trainer.step)):
            if dry_run:
                trainer.logger.info(f"Would log texts to W&B at step {trainer.step}: {', '.join(texts)}.")
                return
            self._row_of(trainer).texts.update(texts)
            self._send_late(trainer)

    def _is_known(self, step: int) -> bool:
        """Whether W&B already has this step from an earlier process."""
        return self._is_in_step and step <= self._last_step

    def _row_of(self, trainer: BaseTrainer) -> _Row:
        if self._row is not None and self._row.step != trainer.step:
            self._flush(trainer)
        if self._row is None:
            self._row = _Row(trainer.step)
        return self._row

    def _flush(self, trainer: BaseTrainer, at_once: bool = False) -> None:
        """Send the waiting rows. Rank 0."""
        if self._row is not None:
            self._recent.append(self._row)
            self._row = None
        if any(not row.is_sent for row in self._recent):
            self._guard.attempt(trainer, lambda: self._send(trainer), at_once)

    def _send(self, trainer: BaseTrainer) -> None:
        if isinstance(self._guard.error, ConnectionError):  # wandb's own process has died, for example out of memory
            import wandb

            with contextlib.suppress(Exception):
                wandb.teardown()
            self._open(trainer)
        for row in self._recent:
            if not row.is_sent:
                images = row.images or _images_again(row.files)
                objects = wandb_objects(row.histograms, row.texts)
                self.run.log({**row.numbers, **images, **objects, STEP: row.step})
                row.files = {key: str(image._path) for key, image in images.items()}
                row.is_sent, row.images = True, {}

    def _send_late(self, trainer: BaseTrainer) -> None:
        """Send data that is logged after `train`, for example a final test. It still belongs to the run."""
        if self._is_over and self._run_id is not None:
            self._guard.attempt(trainer, lambda: self._open(trainer), at_once=True)
            self._finish(trainer, self._exit_code)

    # ------------------------------------------------------------------ what outlives the process

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._is_in_step = False
        if self.run is not None:
            self._flush(trainer)
        if self._run_id is not None:
            state_dict[_STATE_KEY] = {
                "run_id": self._run_id,
                "rows": [[row.step, row.numbers, row.files, row.histograms, row.texts] for row in self._recent],
            }

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        state = state_dict.get(_STATE_KEY)
        if state is not None and not self._is_started:
            self._run_id = state["run_id"]
            self._is_complete = False
            self._recent.clear()
            for step, numbers, files, *objects in state["rows"]:  # earlier versions saved three values
                histograms, texts = objects or ({}, {})
                self._recent.append(_Row(step, numbers, files, {}, histograms, texts, is_sent=True))


def _images_again(files: dict[str, str]) -> dict[str, Any]:
    from wandb import Image

    return {key: Image(file) for key, file in files.items() if Path(file).exists()}


def _check_arguments(project: Any, tags: Any, image_format: Any, wandb_kwargs: dict[str, Any]) -> None:
    if project is not None and not isinstance(project, str):
        raise TypeError(f"`project` must be a string or None, but is {describe(project)}.")
    if isinstance(tags, str) or not (tags is None or isinstance(tags, Sequence)):
        raise TypeError(f"`tags` must be a list of strings or None, but is {describe(tags)}.")
    if image_format not in _FORMATS:
        raise ValueError(f"`image_format` must be one of {_FORMATS}, but is {image_format!r}.")
    try:
        from wandb import init  # the name, not the module: an empty folder "wandb" counts as a module
    except ImportError as ex:
        raise ImportError("WandbHook needs wandb. Install it with `pip install 'trainloop-accelerate[wandb]'`.") from ex
    unknown = sorted(set(wandb_kwargs) - set(inspect.signature(init).parameters))
    if unknown:
        raise TypeError(f"WandbHook hands its other arguments to `wandb.init`, which has no {', '.join(unknown)}.")
