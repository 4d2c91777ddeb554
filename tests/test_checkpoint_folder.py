"""The folder of a run's checkpoints: full, taken away, shared by two hooks, under a clock that goes back."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainloop import BaseHook, CheckpointError, CheckpointingHook
from trainloop.checkpoint import Checkpoint, CheckpointStore, EverySeconds, FileSystem
from trainloop.checkpoint import clock as clock_module
from trainloop.checkpoint.disk import lock as lock_module
from trainloop.checkpoint.load.reader import RemovedError
from trainloop.state import training

from .folders import Quick, flip, steps_in
from .small import SmallTrainer
from .tampering import reseal, set_to
from .workers.checkpoint_store import ABOUT, assert_holds, folder_of, names, saved, small


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


class Do(BaseHook):
    """Calls `action(trainer)` after each step."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_after_step(self, trainer: Any) -> None:
        self.action(trainer)


def trainer_of(path: Path, max_steps: int, *hooks: BaseHook, **kwargs: Any) -> SmallTrainer:
    return SmallTrainer(max_steps, workspace=path, hooks_=lambda self: list(hooks), **kwargs)


def fail_at(step: int) -> Do:
    def fail(trainer: Any) -> None:
        if trainer.step == step:
            raise RuntimeError(f"the end of step {step}")

    return Do(fail)


# ---------------------------------------------------------------------- a full disk


def leave_behind(root: Path) -> Path:
    """What a run leaves that died while it saved."""
    dead = root / ".tmp-step_0000030-dead"
    dead.mkdir()
    (dead / "half").write_bytes(b"x")
    return dead


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_full_disk_is_cleaned_up_first(root: Path, monkeypatch: pytest.MonkeyPatch, has_lock: bool) -> None:
    """Where the leftovers of a dead run take the last byte, the next one removes them before it needs room for its
    lock, whether or not the lock file is there; so does `prune`.
    """
    saved(root, 10)

    def make_full() -> None:
        dead = leave_behind(root)
        if not has_lock:
            (root / ".lock").unlink()
        real_open, real_write = os.open, os.pwrite

        def is_full() -> None:
            if dead.exists():
                raise OSError(errno.ENOSPC, "No space left on device")

        def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT and not os.path.lexists(path):
                is_full()
            return real_open(path, flags, *args, **kwargs)

        monkeypatch.setattr(lock_module.os, "open", open_)
        monkeypatch.setattr(lock_module.os, "pwrite", lambda *args: (is_full(), real_write(*args))[1])

    make_full()
    store = CheckpointStore(root)
    store.open()
    assert names(root) == ["latest", "step_0000010"]
    store.save(20, small(20), **ABOUT)
    store.close()
    make_full()
    from trainloop.__main__ import main

    assert main(["checkpoints", "prune", str(root), "--keep-previous", "1", "--yes"]) == 0
    assert names(root) == ["latest", "step_0000020"]


def test_a_folder_that_another_run_has_is_not_cleaned_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk: the leftover may be the save of a run at work."""
    monkeypatch.setattr(lock_module, "_PATIENCE_SECONDS", 0.1)
    store = CheckpointStore(saved(root, 10))
    store.open()
    dead = leave_behind(root)
    monkeypatch.setattr(lock_module.os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(CheckpointError, match="in use by another run"):
        CheckpointStore(root).open()
    assert dead.exists()
    store.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_disk_that_is_full_indeed_is_cleaned_up_first(tiny_disk: Path, has_lock: bool) -> None:
    """The same on a real disk without a free byte."""
    root = saved(tiny_disk / "checkpoints", 10)
    dead = leave_behind(root)
    if not has_lock:
        (root / ".lock").unlink()
    with open(dead / "half", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    store = CheckpointStore(root)
    store.open()
    assert names(root) == ["latest", "step_0000010"]
    assert_holds(store.resolve("latest"), 10)
    store.close()


# ---------------------------------------------------------------------- a folder that is taken away


def another_run(root: Path) -> None:
    """Takes the folder as a second run would, once the lock file of the first is gone."""
    (root / ".lock").unlink()
    other = CheckpointStore(root)
    other.open()
    other.save(99, small(99), run_id="other")
    other.close()


TAKEN: dict[str, tuple[Any, str]] = {
    "lock": (lambda root: (root / ".lock").unlink(), r"\.lock was removed"),
    "folder": (shutil.rmtree, r"\.lock was removed"),
    "other run": (another_run, rf"\.lock is that of another run \(process {os.getpid()} on "),
    "link": (lambda root: ((root / ".lock").unlink(), (root / ".lock").symlink_to("x")), r"\.lock was removed"),
}


@pytest.mark.parametrize("how", TAKEN)
@pytest.mark.parametrize("save", ["save", "save_async"])
def test_a_folder_that_was_taken_away_is_noticed_at_the_next_save(root: Path, how: str, save: str) -> None:
    """Nothing is written into it by the run that has lost it, and the error says why."""
    take, message = TAKEN[how]
    store = CheckpointStore(saved(root, 10))
    store.open()
    take(root)
    before = names(root) if root.exists() else None
    with pytest.raises(CheckpointError, match=f"step 20 was not saved.*is no longer this run's.*{message}"):
        getattr(store, save)(20, small(20), **ABOUT)
    assert (names(root) if root.exists() else None) == before
    store.close()


class Taken(FileSystem):
    """While a checkpoint is written, another run takes the folder."""

    def write(self, path: Path, buffers: Iterable[Any], sync: bool = True) -> None:
        super().write(path, buffers, sync)
        lock = path.parents[2] / ".lock"
        if lock.exists():
            lock.unlink()


@pytest.mark.parametrize("save", ["save", "save_async"])
def test_a_folder_that_is_taken_during_a_save_is_not_committed_to(root: Path, save: str) -> None:
    """It is looked at again before the commit."""
    store = CheckpointStore(saved(root, 10), fs=Taken())
    with pytest.raises(CheckpointError, match=r"step 20 was not saved.*is no longer this run's"):  # noqa: PT012
        getattr(store, save)(20, small(20), **ABOUT)
        store.wait()  # an async one is told here
    assert names(root) == ["latest", "step_0000010"]
    store.close()


def test_a_run_whose_folder_was_removed_ends_with_an_error(tmp_path: Path) -> None:
    """It goes on with its steps, but does not end as if it were saved."""

    def remove(trainer: Any) -> None:
        if trainer.step == 3:
            shutil.rmtree(tmp_path / "checkpoints")

    trainer = trainer_of(tmp_path, 6, CheckpointingHook(2), Do(remove))
    with pytest.raises(CheckpointError, match=r"step 6 was not saved.*is no longer this run's"):
        trainer.train()
    assert trainer.step == 6


def test_the_link_for_people_leaves_nothing_behind(root: Path) -> None:
    """Where a folder has the name `latest`, as in a copy that followed links, the link is not set and nothing stays."""
    saved(root, 10)
    (root / "latest").unlink()
    (root / "latest").mkdir()
    saved(root, 20, 30)
    assert names(root) == ["latest", "step_0000010", "step_0000020", "step_0000030"]


# ---------------------------------------------------------------------- a clock that goes back


def test_times_of_commits_never_go_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two lives of a run, each at a clock that was set back: the time goes on at its pace, and `EverySeconds`
    keeps checkpoints at its distances.
    """
    wall, monotonic = itertools.chain([5000.0], itertools.repeat(1000.0)), itertools.count(100.0, 60.0)
    monkeypatch.setattr(clock_module.time, "time", lambda: next(wall))
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: next(monotonic))
    for steps in (range(1, 6), range(6, 11)):
        store = CheckpointStore(root, fs=Quick())
        for step in steps:
            store.save(step, small(step), **ABOUT, retention=[EverySeconds(120)])
        store.close()
    infos = CheckpointStore(root).checkpoints()
    times = [info.time for info in infos]
    assert times == sorted(times)
    assert len(times) >= 5
    assert min(b - a for a, b in itertools.pairwise(times[:-1])) >= 120


# ---------------------------------------------------------------------- two hooks


def two(**kwargs: Any) -> list[CheckpointingHook]:
    return [CheckpointingHook(10, path="slow", **kwargs), CheckpointingHook(3, path="fast", keep_previous=1, **kwargs)]


@pytest.mark.parametrize("order", [1, -1])
def test_two_hooks_resume_from_the_newest_of_all(tmp_path: Path, order: int, caplog: pytest.LogCaptureFixture) -> None:
    """One saves every 10 steps, the other every 3; a run that died at 19 goes on after 18, whichever comes first. What
    is damaged or not healthy in one folder leads to the best of both.
    """
    with pytest.raises(RuntimeError, match="the end of step 19"):
        trainer_of(tmp_path, 30, *two()[::order], fail_at(19)).train()
    assert (steps_in(tmp_path / "slow"), steps_in(tmp_path / "fast")) == ([10], [15, 18])

    def resumes(path: Path, step: int, *hooks: BaseHook) -> SmallTrainer:
        trainer = trainer_of(path, 30, *(hooks or two()[::order]), fail_at(step + 1))
        with pytest.raises(RuntimeError, match=f"the end of step {step + 1}$"):
            trainer.train()
        return trainer

    for i, (spoil, step) in enumerate(
        [
            (lambda path: None, 18),
            (lambda path: flip(folder_of(path / "fast", 18) / "model/model.safetensors"), 15),
            (lambda path: reseal(folder_of(path / "fast", 18), set_to(False, "health")), 15),
            (lambda path: [flip(f / "model/model.safetensors") for f in (path / "fast").glob("step_*")], 10),
            (lambda path: flip(folder_of(path / "slow", 10) / "manifest.json"), 18),
        ]
    ):
        path = Path(shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{i}"), symlinks=True))
        spoil(path)
        caplog.clear()
        resumes(path, step)
        assert ("All checkpoints in" in caplog.text) == (step == 10)
    whole = trainer_of(tmp_path / "whole", 21)
    whole.train()
    again = trainer_of(tmp_path, 21, *two()[::order])
    again.train()
    assert again.step == 21
    assert torch.equal(again.model.weight, whole.model.weight)
    ids = {Checkpoint.open(tmp_path / name).manifest.run_id for name in ("slow/latest", "fast/latest")}
    assert len(ids) == 1
    assert "" not in ids


def test_newest_of_two_folders_does_not_depend_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the clock is set back between two lives, commits of the second are the newer ones all the same."""
    trainer_of(tmp_path, 10, *two()).train()
    monkeypatch.setattr(clock_module.time, "time", lambda: 1e9)
    with pytest.raises(RuntimeError):
        trainer_of(tmp_path, 30, *two(), fail_at(13)).train()
    trainer = trainer_of(tmp_path, 30, *two(), fail_at(14))
    with pytest.raises(RuntimeError):
        trainer.train()
    assert trainer.step == 14  # 12 of the folder "fast", not 10 of both
    assert steps_in(tmp_path / "slow") == [10]


def test_only_one_hook_names_what_is_loaded(tmp_path: Path) -> None:
    """A step or path of one hook goes before the latest of another; of two it is an error."""
    trainer_of(tmp_path, 20, *two(keep_interval=5)).train()
    first, second = two()
    second.load = folder_of(tmp_path / "slow", 10)
    trainer = trainer_of(tmp_path, 30, first, second, fail_at(11))
    with pytest.raises(RuntimeError, match="step 11"):
        trainer.train()
    first.load = 10
    with pytest.raises(ValueError, match="must name a step or a path in one CheckpointingHook only, but it is 10 and"):
        trainer_of(tmp_path, 30, first, second).train()


# ---------------------------------------------------------------------- what a path means


def test_a_manifest_decides(tmp_path: Path) -> None:
    """A checkpoint beside whose manifest an export lies is resumed, and a folder of checkpoints with an export in it is
    no foreign model.
    """
    trainer_of(tmp_path, 4, CheckpointingHook(2)).train()
    folder = folder_of(tmp_path / "checkpoints", 4)
    for place in (folder, folder.parent):
        shutil.copy(folder / "model" / "model.safetensors", place / "export.safetensors")
    steps: list[int] = []
    trainer_of(tmp_path / "other", 5, CheckpointingHook(2, load=folder), Do(lambda t: steps.append(t.step))).train()
    assert steps == [5]
    with pytest.raises(CheckpointError, match="holds checkpoints; give one of them: step_0000004"):
        trainer_of(tmp_path / "third", 5, CheckpointingHook(2, load=folder.parent)).train()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json is not one of trainloop's"):
        trainer_of(tmp_path / "fourth", 5, CheckpointingHook(2, load=folder)).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("hooks"), "KeyError: 'hooks'"),
        (lambda state: state.pop("data"), "holds state that no run has saved"),
        (lambda state: state.update(optimizer=[]), "rank 0: [A-Za-z]*Error"),
        (lambda state: state.update(data={"$items": [[1, 2]]}), "holds state that no run has saved"),
    ],
)
def test_state_that_no_run_has_saved_is_an_error(tmp_path: Path, change: Any, message: str) -> None:
    """Nested state that can be decoded but lacks what a run needs is told as what it is."""
    trainer_of(tmp_path, 4, CheckpointingHook(2)).train()
    folder = folder_of(tmp_path / "checkpoints", 4)
    state = json.loads((folder / "state" / "global.json").read_text())
    change(state)
    (folder / "state" / "global.json").write_text(json.dumps(state))
    reseal(folder)
    with pytest.raises(CheckpointError, match=message):
        trainer_of(tmp_path, 5, CheckpointingHook(2)).train()


def test_a_run_starts_from_the_link_of_another_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the other run removes the checkpoint while it is read, the link is followed once more; a step is an error."""
    trainer_of(tmp_path, 4, CheckpointingHook(2)).train()
    other = tmp_path / "checkpoints"
    real = training.read_state

    def read_late(trainer: Any, checkpoint: Checkpoint) -> Any:
        monkeypatch.setattr(training, "read_state", real)
        trainer_of(tmp_path, int(checkpoint.folder.name[5:]) + 2, CheckpointingHook(2)).train()
        return real(trainer, checkpoint)

    monkeypatch.setattr(training, "read_state", read_late)
    trainer = trainer_of(tmp_path / "mine", 7, CheckpointingHook(9, load=other / "latest"), fail_at(7))
    with pytest.raises(RuntimeError, match="the end of step 7"):
        trainer.train()
    assert steps_in(other) == [6]
    monkeypatch.setattr(training, "read_state", read_late)
    with pytest.raises(RemovedError, match="was removed or saved again while it was read"):
        trainer_of(tmp_path / "mine", 9, CheckpointingHook(9, load=folder_of(other, 6))).train()
