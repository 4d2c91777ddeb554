"""Accelerate's experiment trackers: TensorBoard, MLflow, trackio and the others that it supports, or your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from ..errors import describe
from ..histograms import flatten_histograms, flatten_texts, to_histogram
from ..hook import BaseHook, CheckpointerHook
from ..images import flatten_images, to_pil
from ..paths import parse_path
from ..records import Records, check_records
from .tracker_forms import log_histogram, log_text
from .tracking import Guard, arguments_of, flat_config, launch_of, numbers_by_name, on_rank_zero, read_config

if TYPE_CHECKING:
    from PIL import Image

    from ..trainer import BaseTrainer

_EXTRAS = {"tensorboard": "trackers", "wandb": "wandb"}
_ONE_IMAGE_A_KEY = {"aim", "clearml"}  # for these, Accelerate needs one image per key; the others take a list


class TrackerHook(BaseHook):
    """Logs to trackers through Accelerate, on rank 0: numbers under names like "train/loss", images, histograms,
    texts, and the config.

    TensorBoard shows each step once, also after a resume: steps that a killed process logged after the checkpoint are
    purged. Each process starts a new run in the other trackers, unless `init_kwargs` name a run to continue. For
    Weights & Biases, `WandbHook` does more.

    During the run, `trainer.accelerator.get_tracker(name)` works as Accelerate documents. If a tracker fails then, the
    error is logged, the data is left out, and training continues.

    Args:
        log_with: One tracker or a list. Each is a name that Accelerate knows ("tensorboard", "wandb", "trackio",
            "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", or the name of a class registered with
            `accelerate.tracking.register_tracker_class`), or an `accelerate.tracking.GeneralTracker` object.
        project: Name of the project, experiment or run, depending on the tracker.
        config: A mapping, or the path of a JSON file. None: the trainer's own arguments, world size, strategy, device
            and versions. Nested keys are joined with "/"; lists are written as JSON.
        logging_dir: Folder for trackers that write files, relative to the trainer's `workspace`.
        init_kwargs: More arguments, by the name of the tracker, as for `Accelerator.init_trackers`.

    Raises:
        ImportError: A tracker is not installed.
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        log_with: str | GeneralTracker | list[str | GeneralTracker],
        project: str = "trainloop",
        config: Any = None,
        *,
        logging_dir: Path | str = "trackers",
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        given = list(log_with) if isinstance(log_with, list | tuple) else [log_with]
        if not given:
            raise ValueError("`log_with` must name at least one tracker, but is empty.")
        self.log_with = [_checked(tracker) for tracker in given]
        if not isinstance(project, str):
            raise TypeError(f"`project` must be a string, but is {describe(project)}.")
        if not isinstance(logging_dir, str | Path):
            raise TypeError(f"`logging_dir` must be a path, but is {describe(logging_dir)}.")
        self.project = project
        self.config = read_config(config)
        self.logging_dir = parse_path("logging_dir", logging_dir)
        self.init_kwargs = dict(init_kwargs or {})
        foreign = set(self.init_kwargs) - {tracker for tracker in self.log_with if isinstance(tracker, str)}
        if foreign:
            raise ValueError(f"`init_kwargs` must have names of `log_with` as keys, but has {', '.join(foreign)}.")
        self.needs_workspace = not self.logging_dir.is_absolute() and any(
            isinstance(tracker, str) and LOGGER_TYPE_TO_CLASS[tracker].requires_logging_directory
            for tracker in self.log_with
        )
        self._trackers: list[tuple[GeneralTracker, Guard]] = []
        self._waiting: list[Callable[[Any], None]] = []
        self._is_over = False
        self._told: set[str] = set()

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do."""
        folder = (workspace / self.logging_dir).resolve()
        names = [tracker for tracker in self.log_with if isinstance(tracker, str)]
        return [(f"log with {name} to project {self.project!r} and folder {folder}", "project") for name in names]

    # ------------------------------------------------------------------ the trackers

    def on_before_train(self, trainer: BaseTrainer) -> None:
        if not trainer.dry_run:
            on_rank_zero(lambda: self._open(trainer), "TrackerHook could not start its trackers")

    def on_after_train(self, trainer: BaseTrainer) -> None:
        self._close(trainer)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        self._close(trainer)

    def _open(self, trainer: BaseTrainer) -> None:
        launch = {} if self.config is not None else {"launch": launch_of(trainer)}
        config = flat_config({**(arguments_of(trainer) if self.config is None else self.config), **launch})
        for wanted in self.log_with:
            tracker = self._made(wanted, trainer) if isinstance(wanted, str) else wanted
            tracker.start()
            guard = Guard(tracker.name, "Until it works again, nothing is logged to it.")
            self._trackers.append((tracker, guard))
            trainer.accelerator.trackers.append(tracker)
            if tracker.name != "tensorboard" or trainer.step == 0:  # TensorBoard would show the config again
                guard.attempt(trainer, partial(tracker.store_init_configuration, config))
        waiting, self._waiting = self._waiting, []
        for write in waiting:
            self._write(trainer, write)

    def _made(self, name: str, trainer: BaseTrainer) -> GeneralTracker:
        kind = LOGGER_TYPE_TO_CLASS[name]
        kwargs = dict(self.init_kwargs.get(name, {}))
        if name == "tensorboard" and any(isinstance(hook, CheckpointerHook) for hook in trainer.hooks):
            # Steps that a killed process logged after the checkpoint are logged again; without a checkpoint, all steps.
            kwargs.setdefault("purge_step", trainer.step + 1 if trainer.step else 0)
        if not kind.requires_logging_directory:
            return kind(self.project, **kwargs)
        folder = self.logging_dir if trainer.workspace is None else trainer.workspace / self.logging_dir
        return kind(self.project, str(folder), **kwargs)

    def _close(self, trainer: BaseTrainer) -> None:
        for tracker, guard in self._trackers:
            trainer.accelerator.trackers = [one for one in trainer.accelerator.trackers if one is not tracker]
            guard.attempt(trainer, tracker.finish, at_once=True)
        self._trackers = []
        self._is_over = True

    # ------------------------------------------------------------------ what is logged

    def on_log(self, trainer: BaseTrainer, records: Records, dry_run: bool) -> None:
        check_records(records)
        if not trainer.accelerator.is_main_process:
            return
        numbers, step = numbers_by_name(records), trainer.step
        if dry_run:
            trainer.logger.info(f"Would log to {self._names()} at step {step}: {numbers}.")
        else:
            self._write(trainer, lambda tracker: tracker.log(numbers, step=step))

    def on_log_images(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        images = flatten_images(records)
        if not trainer.accelerator.is_main_process:
            return
        pictures, step = {"/".join(path): to_pil("/".join(path), image) for path, image in images.items()}, trainer.step
        if dry_run:
            sizes = ", ".join(f"{key} ({picture.width} x {picture.height})" for key, picture in pictures.items())
            trainer.logger.info(f"Would log images to {self._names()} at step {step}: {sizes}.")
            return

        def write(tracker: Any) -> None:
            if hasattr(tracker, "log_images"):
                _log_images(tracker, pictures, step)
            else:
                self._tell_once(trainer, f"Accelerate cannot log images to {tracker.name}, so they are left out.")

        self._write(trainer, write)

    def on_log_histogram(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        flat = flatten_histograms(records)
        if trainer.accelerator.is_main_process:
            histograms = {"/".join(path): to_histogram("/".join(path), value) for path, value in flat.items()}
            self._write_objects(trainer, histograms, "histogram", log_histogram, dry_run)

    def on_log_text(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        flat = flatten_texts(records)
        if trainer.accelerator.is_main_process:
            texts = {"/".join(path): text for path, text in flat.items()}
            self._write_objects(trainer, texts, "text", log_text, dry_run)

    def _write_objects(
        self,
        trainer: BaseTrainer,
        objects: Mapping[str, Any],
        kind: str,
        log: Callable[[Any, Mapping[str, Any], int], bool],
        dry_run: bool,
    ) -> None:
        step = trainer.step
        if dry_run:
            trainer.logger.info(f"Would log {kind}s to {self._names()} at step {step}: {', '.join(objects)}.")
            return

        def write(tracker: Any) -> None:
            if not log(tracker, objects, step):
                self._tell_once(
                    trainer,
                    f"{tracker.name} takes no {kind}s: they are left out. MetricsFileHook writes them to a file.",
                )

        self._write(trainer, write)

    def _write(self, trainer: BaseTrainer, write: Callable[[Any], None]) -> None:
        if not self._trackers:
            self._waiting.append(write)  # perhaps from a hook that comes before this one
            if self._is_over:
                self._tell_once(trainer, f"Records for {self._names()} after `train` are kept until the next `train`.")
        for tracker, guard in self._trackers:
            guard.attempt(trainer, partial(write, tracker))

    def _names(self) -> str:
        return ", ".join(tracker if isinstance(tracker, str) else tracker.name for tracker in self.log_with)

    def _tell_once(self, trainer: BaseTrainer, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            trainer.logger.warning(message)


def _log_images(tracker: Any, pictures: Mapping[str, Image.Image], step: int) -> None:
    """Log images in the form that Accelerate's wrapper of the tracker expects."""
    if tracker.name == "tensorboard":
        batches = {key: np.asarray(picture.convert("RGB"))[None] for key, picture in pictures.items()}
        tracker.log_images(batches, step=step, dataformats="NHWC")
        tracker.tracker.flush()  # Accelerate flushes only after numbers
    elif tracker.name in _ONE_IMAGE_A_KEY:
        tracker.log_images(dict(pictures), step=step)
    else:
        tracker.log_images({key: [picture] for key, picture in pictures.items()}, step=step)


def _checked(tracker: Any) -> str | GeneralTracker:
    """Return the tracker object, or the name of an installed tracker. Raise for anything else."""
    if isinstance(tracker, GeneralTracker):
        return tracker
    if not isinstance(tracker, str | LoggerType):
        raise TypeError(f"`log_with` must be names or objects of GeneralTracker, but one is {describe(tracker)}.")
    name = str(tracker)
    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ValueError(f"`log_with` must name trackers that Accelerate knows ({known}), but one is {name!r}.")
    if name in LoggerType and LoggerType(name) not in get_available_trackers():
        package = f"'trainloop-accelerate[{_EXTRAS[name]}]'" if name in _EXTRAS else name
        raise ImportError(f"TrackerHook needs {name}. Install it with `pip install {package}`.")
    return name
