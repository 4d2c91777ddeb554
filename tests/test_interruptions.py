"""A run that stops, is interrupted or fails: where it stands then, and what the next `train` and the next start do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import (
    BaseHook,
    BaseTrainer,
    CheckpointError,
    CheckpointingHook,
    EmaHook,
    ImageFileLoggerHook,
    TrackerHook,
    TrainingError,
)
from trainloop.checkpoint import Checkpoint, CheckpointStore

from .small import SmallTrainer


class At(BaseHook):
    """Calls `action(trainer)` at one event of one step, the first time that it comes."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        self.is_done = False

        def act(trainer: BaseTrainer) -> None:
            if trainer.step == step and not self.is_done:
                self.is_done = True
                action(trainer)

        setattr(self, event, act)


def fail(trainer: BaseTrainer) -> None:
    raise KeyboardInterrupt


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


# ---------------------------------------------------------------------- the step is counted when it is applied


def num_updates(trainer: BaseTrainer) -> int:
    return int(next(iter(trainer._raw_optimizer.state.values()))["step"])


def batch_norm(self: BaseTrainer) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


EVENTS = ["on_before_step", "on_before_optimizer_step", "on_after_optimizer_step", "on_after_step", "forward"]


@pytest.mark.parametrize("event", EVENTS)
def test_an_interrupted_step_is_counted_when_it_was_applied(tmp_path: Path, event: str) -> None:
    """Ctrl-C in step 4, then `train`: the run ends at step 8 with 8 updates, BatchNorm's counter and the checkpoint
    agree.
    """
    hooks: list[BaseHook] = [CheckpointingHook(2, load=None)]
    if event != "forward":
        hooks.append(At(event, 4, fail))
    calls: list[int] = []

    def forward(self: BaseTrainer, batch: Any) -> Any:
        loss = self.model(batch[0]).pow(2).mean()
        calls.append(self.step)
        if event == "forward" and calls.count(4) == 1 and self.step == 4:
            raise KeyboardInterrupt  # the running statistics have moved already
        return loss, {}

    trainer = SmallTrainer(
        8,
        workspace=tmp_path,
        hooks_=lambda self: hooks,
        model_=batch_norm,
        forward_=forward,
        optimizer_=lambda self: torch.optim.AdamW(self.model.parameters()),
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    was_applied = event.startswith("on_after")
    assert trainer.step == num_updates(trainer) == (4 if was_applied else 3)
    assert trainer.model[1].num_batches_tracked.item() == trainer.step  # type: ignore[index]
    trainer.train()
    assert trainer.step == num_updates(trainer) == 8
    assert trainer.model[1].num_batches_tracked.item() == 8  # type: ignore[index]
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "step_0000008")
    assert checkpoint.global_state()["step"] == 8


def test_an_interrupted_update_is_not_gone_on_with(tmp_path: Path) -> None:
    """Half of the weights may be updated: `train` refuses, a checkpoint and `load_state_dict` mend it."""

    class Torn(torch.optim.SGD):
        num_calls = 0

        def step(self, closure: Any = None) -> Any:
            self.num_calls += 1
            if self.num_calls == 3:
                raise KeyboardInterrupt
            return super().step(closure)

    def make(max_steps: int = 5) -> SmallTrainer:
        return SmallTrainer(
            max_steps,
            workspace=tmp_path,
            hooks_=lambda self: [CheckpointingHook(1)],
            optimizer_=lambda self: Torn(self.model.parameters(), lr=0.1),
        )

    trainer = make()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(TrainingError, match=r"The update of step 3 was interrupted.*Make a new trainer"):
        trainer.train()
    whole = make()
    whole.given["optimizer_"] = lambda self: torch.optim.SGD(self.model.parameters(), lr=0.1)
    whole.given["hooks_"] = lambda self: []
    whole.max_steps = 2
    whole.train()
    trainer.load_state_dict(whole.state_dict())
    trainer.train()
    assert trainer.step == 5


@pytest.mark.parametrize("is_late", [False, True])
def test_a_restore_that_failed_is_done_anew(tmp_path: Path, is_late: bool) -> None:
    """A hook that comes before or after the checkpointer fails once in `on_before_train`: the next `train` resumes, and
    every hook gets its state. It began at step 0, over the old checkpoints, or without the states of later hooks.
    """

    class Shaky(BaseHook):
        fails = False

        def on_before_train(self, trainer: BaseTrainer) -> None:
            if self.fails:
                self.fails = False
                raise ConnectionError("no login")

    def make(max_steps: int, shaky: Shaky, average: EmaHook) -> SmallTrainer:
        checkpointing = CheckpointingHook(2)
        hooks = [checkpointing, shaky, average] if is_late else [shaky, checkpointing, average]
        return SmallTrainer(max_steps, workspace=tmp_path, hooks_=lambda self: hooks)

    make(4, Shaky(), EmaHook(0.9)).train()
    shaky, average = Shaky(), EmaHook(0.9)
    shaky.fails = True
    trainer = make(6, shaky, average)
    with pytest.raises(ConnectionError):
        trainer.train()
    trainer.train()
    assert (trainer.step, average.num_updates) == (6, 6)


def test_a_checkpoint_that_could_not_be_loaded_is_loaded_by_the_next_train(tmp_path: Path) -> None:
    """A checkpoint named by `load` isn't there yet: the next `train` doesn't begin at step 0 in silence."""
    SmallTrainer(2, workspace=tmp_path / "old", hooks_=lambda self: [CheckpointingHook(2)]).train()
    folder = tmp_path / "old" / "checkpoints" / "step_0000002"
    away = folder.rename(tmp_path / "away")
    begun: list[int] = []
    hooks = [CheckpointingHook(2, load=folder), At("on_before_step", 1, lambda trainer: begun.append(trainer.step))]
    trainer = SmallTrainer(3, workspace=tmp_path / "new", hooks_=lambda self: hooks)
    with pytest.raises(CheckpointError):
        trainer.train()
    away.rename(folder)
    trainer.train()
    assert (trainer.step, begun) == (3, [])


# ---------------------------------------------------------------------- a request ends with its `train`


def ask_to_stop(trainer: BaseTrainer) -> None:
    trainer.request_stop()


def send_sigterm(trainer: BaseTrainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("event", ["on_before_step", "on_after_step"])
@pytest.mark.parametrize("ask", [ask_to_stop, send_sigterm])
def test_a_request_ends_with_the_train_that_it_was_made_in(tmp_path: Path, event: str, ask: Any) -> None:
    """A stop or a signal in the last step, agreed on or not any more: the next `train` runs to its end."""
    hooks = [At(event, 3, ask), CheckpointingHook(2, exit_signals="SIGTERM")]
    trainer = SmallTrainer(3, workspace=tmp_path, hooks_=lambda self: hooks)
    if ask is send_sigterm and event == "on_before_step":
        with pytest.raises(SystemExit):
            trainer.train()
    else:
        trainer.train()
    trainer.max_steps = 7
    trainer.train()
    assert trainer.step == 7


def test_a_request_before_train_is_heard() -> None:
    """`request_stop` before `train` ends that `train` with its first step, as ever."""
    trainer = SmallTrainer(5)
    trainer.request_stop()
    trainer.train()
    assert trainer.step == 1
    trainer.train()
    assert trainer.step == 5


# ---------------------------------------------------------------------- folders


def test_a_relative_folder_is_where_it_was_at_construction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.chdir` after construction changes neither the workspace nor the checkpoint that is loaded."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = SmallTrainer(2, workspace="run", hooks_=lambda self: [CheckpointingHook(1)])
    os.chdir("elsewhere")
    trainer.train()
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]
    os.chdir("..")
    branch = CheckpointingHook(1, load="run/checkpoints/step_0000002")
    store = CheckpointStore("run/checkpoints")
    trainer = SmallTrainer(3, workspace="branch", hooks_=lambda self: [branch])
    os.chdir("elsewhere")
    trainer.train()
    assert saved_steps(tmp_path / "branch" / "checkpoints") == [3]
    assert [info.step for info in store.checkpoints()] == [2]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everywhere that a path is taken."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    SmallTrainer(1, workspace="~/run", hooks_=lambda self: [CheckpointingHook(1)]).train()
    assert saved_steps(tmp_path / "run" / "checkpoints") == [1]
    hooks = [CheckpointingHook(1, path="~/own", load="~/run/checkpoints/step_0000001")]
    trainer = SmallTrainer(2, hooks_=lambda self: hooks)
    trainer.train()
    assert saved_steps(tmp_path / "own") == [2]
    assert ImageFileLoggerHook(path="~/images").path == tmp_path / "images"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("url", ["s3://bucket/run", Path("gs://bucket/run"), "hf://datasets/run", "file:///run"])
@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("workspace", lambda url: SmallTrainer(workspace=url)),
        ("path", lambda url: CheckpointingHook(1, path=url)),
        ("load", lambda url: CheckpointingHook(1, load=url)),
        ("path", lambda url: CheckpointStore(url)),
        ("path", lambda url: ImageFileLoggerHook(path=url)),
        ("logging_dir", lambda url: TrackerHook("tensorboard", logging_dir=url)),
    ],
)
def test_a_url_is_refused(url: str, argument: str, make: Any) -> None:
    """No store serves it yet, and a folder named `s3:` is what nobody wants."""
    with pytest.raises(ValueError, match=rf"`{argument}` must be a path of the local file system, but is '\w+:/"):
        make(url)


# ---------------------------------------------------------------------- what a restart will do


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("is_async", [False, True])
def test_an_interruption_names_the_last_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[BaseException], is_async: bool
) -> None:
    """And says that a restart goes on from it; or that there is none yet."""

    def stop(trainer: BaseTrainer) -> None:
        raise error("stop")

    for interval, step, told in (
        (2, 5, f"The run ended after step 4. The next start continues from {tmp_path}/checkpoints/step_0000004."),
        (9, 6, f"The run ended after step 5. The next start continues from {tmp_path}/checkpoints/step_0000004."),
        (9, 2, "The run ended after step 1. The next start starts over: there is no checkpoint."),
    ):
        folder = tmp_path if step > 2 else tmp_path / "fresh"
        hooks = [At("on_before_step", step, stop), CheckpointingHook(interval, async_save=is_async)]
        caplog.clear()
        with pytest.raises(error), caplog.at_level("INFO", "trainloop"):
            SmallTrainer(8, workspace=folder, hooks_=lambda self, hooks=hooks: hooks).train()
        assert told in caplog.text
    hooks = [At("on_before_step", 2, stop), CheckpointingHook(9, load=None)]
    caplog.clear()
    with pytest.raises(error), caplog.at_level("INFO", "trainloop"):
        SmallTrainer(8, workspace=tmp_path, hooks_=lambda self: hooks).train()
    assert "The next start" not in caplog.text  # it would not load anything
