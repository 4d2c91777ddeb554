"""Every tracker of Accelerate gets what it can take, and TensorBoard shows each step once."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from PIL import Image

from trainloop import BaseHook, LoggingHook, TrackerHook, TrainingError

from .launching import REPOSITORY, environment
from .small import SmallTrainer
from .workers.tracking import IMAGES_EVERY, LAST_STEP, VALIDATE_EVERY

WORKER = REPOSITORY / "tests" / "workers" / "tracking.py"


def life(workspace: Path, how: str, step: int) -> None:
    """One process of the run."""
    command = [sys.executable, str(WORKER), str(workspace), "tensorboard", how, str(step)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if how == "never" else -signal.SIGKILL), done.stderr[-4000:]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0}
    )
    accumulator.Reload()
    return accumulator


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    """Killed before its first checkpoint and again later: numbers, images, histograms, texts and
    hyperparameters are those of one run.
    """
    life(tmp_path, "kill", 3)
    life(tmp_path, "kill", 17)
    life(tmp_path, "never", 0)
    seen = events(tmp_path / "trackers" / "trainloop")
    names = ["grad_norm", "loss", "lr/0", "non_finite_grad_retry_count", "step_time", "data_time"]
    assert set(seen.Tags()["scalars"]) == {*(f"train/{name}" for name in names), "val/twice"}
    assert [event.step for event in seen.Scalars("train/loss")] == list(range(1, LAST_STEP + 1))
    validated = list(range(VALIDATE_EVERY, LAST_STEP + 1, VALIDATE_EVERY))
    assert [(event.step, event.value) for event in seen.Scalars("val/twice")] == [(s, 2 * s) for s in validated]
    images = seen.Images("samples/grey")
    assert [image.step for image in images] == list(range(IMAGES_EVERY, LAST_STEP + 1, IMAGES_EVERY))
    assert [(image.width, image.height) for image in images] == [(6, 4)] * len(images)
    shown = list(range(IMAGES_EVERY, LAST_STEP + 1, IMAGES_EVERY))
    histograms = seen.Histograms("steps")
    assert [(event.step, event.histogram_value.num) for event in histograms] == [(step, step) for step in shown]
    assert [sum(event.histogram_value.bucket) for event in histograms] == shown
    texts = [(event.step, event.tensor_proto.string_val) for event in seen.Tensors("words/of/text_summary")]
    assert texts == [(step, [f"<step> {step}\n".encode()]) for step in shown]
    configs = sorted((tmp_path / "trackers" / "trainloop").glob("*/hparams.yml"))
    assert configs, "written by the lives before the first checkpoint"
    assert f"max_steps: {LAST_STEP}" in configs[-1].read_text().splitlines()


def train(tmp_path: Path | None, *hooks: BaseHook, **kwargs: Any) -> SmallTrainer:
    trainer = SmallTrainer(3, workspace=tmp_path, hooks_=lambda self: list(hooks), **kwargs)
    trainer.train()
    return trainer


class Recording(GeneralTracker):
    """A tracker of one's own, that takes everything Accelerate knows of."""

    name = "recording"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.calls: list[Any] = []

    @property
    def tracker(self) -> Any:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("away")
        self.calls.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_histograms_and_texts_reach_the_trackers_that_take_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorBoard, W&B, and one of your own that has the methods; another one is told, with what to add."""

    class Takes(Recording):
        def log_histogram(self, values: Any, step: int) -> None:
            self.calls.append((step, values))

        def log_text(self, values: Any, step: int) -> None:
            self.calls.append((step, values))

    class Wandb(Recording):
        name = "wandb"

    class Objects(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            trainer.log_histogram({"a": [np.arange(4), torch.ones(2, 3)]})
            trainer.log_text({"b": "<c>"})

    takes, wandb, other = Takes(), Wandb(), Recording()
    with caplog.at_level(logging.WARNING, "trainloop"):
        trainer = train(tmp_path, TrackerHook([takes, wandb, other]), Objects())
    assert [(step, list(values)) for step, values in takes.calls[2:4]] == [(1, ["a/0", "a/1"]), (1, ["b"])]
    assert sum(takes.calls[2][1]["a/1"].counts) == 6
    assert takes.calls[3][1] == {"b": "<c>"}
    assert [type(value).__name__ for _, values in wandb.calls[2:4] for value in values.values()] == [
        "Histogram",
        "Histogram",
        "Html",
    ]
    assert other.calls[2:] == ["finish"]
    remedy = "they are left out. MetricsFileHook writes them to a file."
    assert [message.removeprefix("[RANK 0] ") for message in caplog.messages] == [
        f"recording takes no histograms: {remedy}",
        f"recording takes no texts: {remedy}",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "trainloop"):
        trainer.log_histogram({"a": np.arange(4)}, dry_run=True)
        trainer.log_text({"b": "c"}, dry_run=True)
    assert [message.removeprefix("[RANK 0] ") for message in caplog.messages] == [
        "Would log histograms to recording, wandb, recording at step 3: a.",
        "Would log texts to recording, wandb, recording at step 3: b.",
    ]


class Log(BaseHook):
    def __init__(self, records: dict[str, Any]) -> None:
        self.records = records

    def on_after_step(self, trainer: Any) -> None:
        trainer.log(self.records)


def test_a_tracker_gets_plain_values(tmp_path: Path) -> None:
    """Numbers are Python's, whatever they were; names are flat; the config is bools, numbers and strings."""
    tracker = Recording()
    records = {"a": {"np": np.float32(1.5), "tensor": torch.tensor(2), "list": [np.int64(3), True]}, "b": torch.ones(1)}
    config = {"optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}, "path": Path("x"), "none": None, "flag": False}
    train(tmp_path, Log(records), TrackerHook(tracker, config=config))
    plain = {"a/np": 1.5, "a/tensor": 2, "a/list/0": 3, "a/list/1": True, "b": 1.0}
    flat = {"optimizer/lr": 0.1, "optimizer/betas": "[0.9, 0.99]", "path": "x", "none": "None", "flag": False}
    assert tracker.calls == ["start", flat, (1, plain), (2, plain), (3, plain), "finish"]
    assert {type(value) for _, values in tracker.calls[2:5] for value in values.values()} == {float, int, bool}


def test_a_config_that_is_not_given_is_the_trainers(tmp_path: Path) -> None:
    """Its arguments, and what the launch was."""
    tracker = Recording()
    train(tmp_path, TrackerHook(tracker), grad_clip=0.5)
    config = tracker.calls[1]
    assert config["grad_clip"] == 0.5
    assert config["max_non_finite_grad_retries"] == "None"
    assert config["launch/world_size"] == 1
    assert config["launch/versions/torch"] == torch.__version__


def test_images_come_in_the_form_that_the_tracker_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A list of Pillow's for most, one for some, a batch of arrays for TensorBoard; and one that takes none is told."""

    class One(Recording):
        name = "clearml"

    class Without(Recording):
        name = "without"
        log_images = property()  # type: ignore[assignment]  # as if it weren't there

    class Images(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            trainer.log_images({"a": {"b": torch.zeros(3, 2, 5)}})

    trackers = [Recording(), One(), Without()]
    with caplog.at_level(logging.WARNING, "trainloop"):
        train(tmp_path, TrackerHook([*trackers, "tensorboard"]), Images())  # type: ignore[list-item]
    several, one, none = (tracker.calls[2:-1] for tracker in trackers)
    assert [(step, list(values)) for step, values in several] == [(1, ["a/b"]), (2, ["a/b"]), (3, ["a/b"])]
    assert [image.size for image in several[0][1]["a/b"]] == [(5, 2)]
    assert isinstance(one[0][1]["a/b"], Image.Image)
    assert none == []
    assert caplog.messages == ["[RANK 0] Accelerate cannot log images to without, so they are left out."]
    (image, *_) = events(tmp_path / "trackers" / "trainloop").Images("a/b")
    assert (image.width, image.height) == (5, 2)


def test_a_failing_tracker_ends_neither_training_nor_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, and tried again."""
    failing, working = Recording(fails_at=2), Recording()
    with caplog.at_level(logging.INFO, "trainloop"):
        trainer = train(tmp_path, Log({"x": 1}), TrackerHook([failing, working]))
    assert trainer.step == 3
    assert [call[0] for call in working.calls[2:5]] == [1, 2, 3]
    assert failing.calls[-1] == "finish"
    (told,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "Step 2: recording failed. Training continues." in told
    assert told.endswith("ConnectionError: away")


def test_trackers_are_accelerates_while_the_run_is_on(tmp_path: Path) -> None:
    """`get_tracker` gives them; what hooks log before the first step, in any order, is there; after an exception they
    are finished.
    """
    tracker, seen = Recording(), []

    class Look(BaseHook):
        def on_before_train(self, trainer: Any) -> None:
            trainer.log({"start": 1})

        def on_after_step(self, trainer: Any) -> None:
            seen.append(trainer.accelerator.get_tracker("recording"))
            raise RuntimeError("as told")

    trainer = SmallTrainer(3, hooks_=lambda self: [Look(), TrackerHook(tracker, config={})])
    with pytest.raises(RuntimeError, match="as told"):
        trainer.train()
    assert seen == [tracker]
    assert trainer.accelerator.trackers == []
    assert tracker.calls == ["start", {}, (0, {"start": 1}), "finish"]


def test_a_dry_run_says_what_it_would_log(caplog: pytest.LogCaptureFixture) -> None:
    """And logs nothing."""
    tracker = Recording()
    trainer = train(None, TrackerHook(tracker))
    with caplog.at_level(logging.INFO, "trainloop"):
        trainer.log({"a": {"b": 1}}, dry_run=True)
        trainer.log_images({"c": torch.zeros(3, 4, 5)}, dry_run=True)
    assert tracker.calls[2:] == ["finish"]
    assert caplog.messages == [
        "[RANK 0] Would log to recording at step 3: {'a/b': 1}.",
        "[RANK 0] Would log images to recording at step 3: c (5 x 4).",
    ]


def test_mlflow_keeps_metrics_and_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its local store, read back from the files."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    told: dict[int, float] = {}

    class Told(BaseHook):
        def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
            told[trainer.step] = records["train"]["loss"]

    hook = TrackerHook("mlflow", "an experiment", init_kwargs={"mlflow": {"run_name": "a run"}})
    train(tmp_path, LoggingHook(interval=1), hook, Told())
    (run,) = (tmp_path / "store").glob("*/*/params")
    lines = [line.split() for line in (run.parent / "metrics" / "train" / "loss").read_text().splitlines()]
    assert {int(step): float(value) for _, value, step in lines} == told
    assert (run / "max_steps").read_text() == "3"
    assert (run / "launch" / "versions" / "torch").read_text() == torch.__version__
    assert "run_name: a run" in (run.parent / "meta.yaml").read_text()


def test_a_tracker_that_cannot_start_is_told(tmp_path: Path) -> None:
    """With what it said; on every rank, since the others would wait."""

    class Refusing(Recording):
        def start(self) -> None:
            raise PermissionError("no key")

    with pytest.raises(TrainingError, match="TrackerHook could not start its trackers: PermissionError: no key"):
        train(tmp_path, TrackerHook(Refusing()))


def test_wrong_arguments_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At construction; a tracker that is not installed with the command that installs it."""
    for kwargs, message in [
        ({"log_with": "tensorbord"}, "`log_with` must name trackers that Accelerate knows (aim, clearml"),
        ({"log_with": "all"}, "`log_with` must name trackers that Accelerate knows"),
        ({"log_with": [1]}, "`log_with` must be names or objects of GeneralTracker, but one is 1 (int)."),
        ({"log_with": []}, "`log_with` must name at least one tracker, but is empty."),
        ({"log_with": "tensorboard", "project": 1}, "`project` must be a string, but is 1 (int)."),
        ({"log_with": "tensorboard", "logging_dir": None}, "`logging_dir` must be a path, but is None (NoneType)."),
        ({"log_with": "tensorboard", "config": 1}, "`config` must be a mapping, the path of a JSON file or None"),
        (
            {"log_with": "tensorboard", "init_kwargs": {"aim": {}}},
            "`init_kwargs` must have names of `log_with` as keys",
        ),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            TrackerHook(**kwargs)  # type: ignore[arg-type]
    monkeypatch.setattr(tracking, "_available_trackers", [])
    for name, command in [
        ("aim", "pip install aim"),
        ("tensorboard", "pip install 'trainloop-accelerate[trackers]'"),
        ("wandb", "pip install 'trainloop-accelerate[wandb]'"),
    ]:
        with pytest.raises(ImportError, match=re.escape(f"TrackerHook needs {name}. Install it with `{command}`.")):
            TrackerHook(name)


def test_trackers_that_write_files_need_a_workspace(tmp_path: Path) -> None:
    """Unless `logging_dir` is absolute."""
    with pytest.raises(ValueError, match="TrackerHook writes to `workspace`, but it is None"):
        train(None, TrackerHook("tensorboard"))
    train(None, LoggingHook(1), TrackerHook("tensorboard", logging_dir=tmp_path))
    assert len(events(tmp_path / "trainloop").Scalars("train/loss")) == 3
