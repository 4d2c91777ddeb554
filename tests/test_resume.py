"""Killed anywhere, resumed exactly: the run ends with every bit of a run that was never killed."""

from __future__ import annotations

import random
import re
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainloop import CheckpointError, CheckpointingHook
from trainloop.checkpoint import Checkpoint
from trainloop.testing import HOOK_EVENTS, KillAt, assert_resume_exact
from trainloop.testing.lives import launch_environment, live, path_prefix, read_notes, start_step
from trainloop.testing.resume import compare

from .launching import FSDP2
from .small import SmallTrainer
from .workers.resume import make_trainer, sample_ids

LAST = 13
FORMS_OF_RESUME = {"single": (1, ()), "ddp2": (2, ()), "fsdp2": (2, FSDP2)}
"""Processes and launch arguments."""
NUM_OPERATIONS = [28, 10]
"""File operations of a save with two processes, by rank, retention included."""
ELSEWHERE = {
    "on_before_train",
    "on_load_state_dict",
    "on_after_train",
    "on_non_finite_grad",
    "on_log_images",
    "on_log_histogram",
    "on_log_text",
}
"""Events that do not come in each step."""


# ---------------------------------------------------------------------- every bit, however it is launched


@pytest.mark.parametrize("form", FORMS_OF_RESUME)
@pytest.mark.parametrize(
    ("kind", "is_async"),
    [
        ({"data": "map"}, False),
        ({"data": "map", "num_workers": 2}, True),
        ({"data": "stream"}, True),
        ({"data": "stream", "num_workers": 2}, False),
    ],
    ids=["map", "workers", "stream", "stream_in_workers"],
)
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, form: str, kind: Any, is_async: bool) -> None:
    """Killed twice and terminated once, in mid-epoch, mid-window and mid-interval, on either rank: dropout, OneCycle,
    BatchNorm, AdamW, augmentation, an accumulation of 3, sample ids and all that was logged are the same, bit for bit.
    """
    num_processes, launch_args = FORMS_OF_RESUME[form]
    other = num_processes - 1
    kills = [
        KillAt(5, "forward", other, number=2),
        KillAt(7, "on_before_step", other, signal=signal.SIGTERM),
        KillAt(10, "write", other, number=2),
    ]
    assert_resume_exact(
        partial(make_trainer, **kind, keep_previous=1, async_save=is_async, exit_signals="SIGTERM"),
        kills,
        num_processes=num_processes,
        launch_args=launch_args,
        record=sample_ids,
        workspace=tmp_path,
    )
    output = Path(f"{path_prefix(tmp_path / 'killed', 2, 0)}.log").read_text()
    assert re.search(r"SIGTERM was received: saved after step 7 in \S+, exiting with code 143\.", output)
    output = Path(f"{path_prefix(tmp_path / 'killed', 3, 0)}.log").read_text()
    assert "step_0000007. The run continues after step 7." in output
    logged = [row["step"] for row in read_notes(path_prefix(tmp_path / "whole", 1, other)) if row.get("logged")]
    assert logged == [5, 10]
    kept = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step_*"))
    assert kept == ["step_0000012", "step_0000013"]


@pytest.mark.parametrize(("rank", "is_async"), [(0, False), (1, False), (0, True)])
def test_a_run_may_be_killed_at_every_event_and_every_file_operation(tmp_path: Path, rank: int, is_async: bool) -> None:
    """One run of two processes that dies at each event of a hook in turn, and then at each operation of a save: it ends
    as if nothing had been. There is no operation after the last one at which it was killed.
    """
    kills = [KillAt(5, "forward", rank), KillAt(0, "on_before_train", rank), KillAt(0, "on_load_state_dict", rank)]
    kills += [KillAt(5, event, rank) for event in HOOK_EVENTS if event not in ELSEWHERE]
    first, num_operations = 8, NUM_OPERATIONS[rank]
    kills += [KillAt(first + 2 * i, "disk", rank, number=i + 1) for i in range(num_operations)]
    last = first + 2 * num_operations
    kills.append(KillAt(last, "on_after_train", rank))
    make = partial(make_trainer, max_steps=last, async_save=is_async)
    assert_resume_exact(make, kills, num_processes=2, record=sample_ids, workspace=tmp_path)
    with pytest.raises(ValueError, match=f"From step 4 on, rank {rank} has met disk {num_operations} times"):
        live(partial(make_trainer, max_steps=4), tmp_path / "other", KillAt(4, "disk", rank, 99), num_processes=2)


def damage(path: Path, rng: random.Random) -> None:
    """Flip a bit of a file, cut it off, or remove it."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "cut", "remove"])
    if how == "remove" or not content:
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


@pytest.mark.parametrize("num_lives", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_a_run_survives_random_kills_and_random_damage(tmp_path: Path, num_lives: int) -> None:
    """Killed at a random event or file operation, life after life, and after each a random file of a checkpoint is
    damaged, as long as another checkpoint is whole: never does it start anew, and it ends as if nothing had been.
    """
    rng = random.Random(num_lives)
    max_steps, checkpoints = 60 + 4 * num_lives, tmp_path / "killed" / "checkpoints"
    make = partial(make_trainer, max_steps=max_steps, keep_previous=2, async_save=True)
    live(make, tmp_path / "whole")
    kills, num_damaged = [], 0
    for _ in range(num_lives):
        event = rng.choice(["disk", "disk", "disk", "forward", "on_after_step", "on_state_dict"])
        kills.append(KillAt(0, event, number=rng.randint(1, {"disk": 90, "forward": 18}.get(event, 4))))
        live(make, tmp_path / "killed", kills[-1])
        saved = sorted(checkpoints.glob("step_*"))
        whole = [path for path in saved if (path / "manifest.json").exists() and not _problems(path)]
        victim = rng.choice(whole) if len(whole) > 1 else None
        if victim is not None:
            damage(rng.choice([path for path in sorted(victim.rglob("*")) if path.is_file()]), rng)
            num_damaged += 1
    live(make, tmp_path / "killed")
    lives = [read_notes(path_prefix(tmp_path / "killed", number, 0)) for number in range(1, num_lives + 2)]
    starts = [
        row["start"] for life in lives for row in life if "start" in row
    ]  # none: killed while it opened the folder
    first = next(i for i, step in enumerate(starts) if step)
    assert all(starts[first:]), "a run that had a checkpoint has started anew"
    assert num_damaged > num_lives // 2
    compare(tmp_path / "whole", tmp_path / "killed", kills, 1, ())


def _problems(path: Path) -> list[str]:
    try:
        return Checkpoint.open(path).find_problems()
    except CheckpointError as ex:
        return [str(ex)]


# ---------------------------------------------------------------------- another number of processes


def test_over_other_numbers_of_processes_each_sample_is_seen_once(tmp_path: Path) -> None:
    """Four processes (FSDP2), then two (DDP), then three: each takes up what the one before has saved, and all of them
    together see each sample of each epoch exactly once.
    """
    workspace, seen = tmp_path / "run", Counter[int]()
    lives = [
        (4, FSDP2, KillAt(3, "on_after_step", 3), 2),
        (2, (), KillAt(7, "on_after_step", 1), 6),
        (3, (), None, LAST),
    ]
    began = 0
    for number, (num_processes, launch_args, kill, last) in enumerate(lives, 1):
        env = launch_environment(num_processes, launch_args)
        live(make_trainer, workspace, kill, num_processes=num_processes, env=env, record=sample_ids)
        assert start_step(path_prefix(workspace, number, 0)) == began
        for rank in range(num_processes):
            for row in read_notes(path_prefix(workspace, number, rank)):
                if "step" in row and row["step"] <= last:
                    seen.update(sample for _, _, ids in row["recorded"] for sample in ids)
        began = last
    num_epochs, rest = divmod(seen.total(), 37)
    assert seen.total() > 3 * 4 * 20
    assert sorted(seen.values()) == [num_epochs] * (37 - rest) + [num_epochs + 1] * rest
    output = Path(f"{path_prefix(workspace, 3, 0)}.log").read_text()
    assert "The checkpoint was saved by 2 processes, and this run has 3" in output


# ---------------------------------------------------------------------- what is loaded, what is kept


def run(tmp_path: Path, max_steps: int, **kwargs: Any) -> SmallTrainer:
    trainer = SmallTrainer(max_steps, workspace=tmp_path, hooks_=lambda self: [CheckpointingHook(2, **kwargs)])
    trainer.train()
    return trainer


def names(tmp_path: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*"))


def test_what_is_kept_and_loaded_is_as_asked(tmp_path: Path) -> None:
    """`keep_previous`, `keep_interval` and `keep_steps`; a step or a path to load, or none."""
    run(tmp_path, 9, keep_previous=1, keep_interval=4, keep_steps=[2])
    assert names(tmp_path) == [2, 4, 8, 9]
    trainer = run(tmp_path, 2, load=2)
    assert trainer.step == 2
    assert run(tmp_path, 4, load=tmp_path / "checkpoints" / "step_0000004").step == 4
    with pytest.raises(CheckpointError, match="has no checkpoint of step 5, only of: 2, 4, 8, 9"):
        run(tmp_path, 4, load=5)
    assert run(tmp_path, 0, load=None).step == 0
    assert run(tmp_path, 0).step == 9, "latest"


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`latest` falls back to the one before and names the file; one that was asked for by its step raises."""
    run(tmp_path, 5, keep_previous=3)
    file = tmp_path / "checkpoints" / "step_0000005" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape("model/model.safetensors")):
        run(tmp_path, 0, load=5)
    caplog.clear()
    assert run(tmp_path, 0).step == 4
    assert any("model/model.safetensors" in line for line in caplog.messages)


def test_wrong_arguments_are_told() -> None:
    """At construction."""
    for kwargs, message in [
        ({"interval": 0}, "`interval` must be at least 1, but is 0."),
        ({"interval": 1, "keep_previous": -1}, "`keep_previous` must be at least 0, but is -1."),
        ({"interval": 1, "exit_signals": ["SIGNONE"]}, "`exit_signals` must be signals, by number or name"),
        ({"interval": 1, "verify": "some"}, "`verify` must be one of ('full', 'size', 'off'), but is 'some'."),
        ({"interval": 1, "on_busy": "go"}, "`on_busy` must be one of ('wait', 'skip'), but is 'go'."),
        (
            {"interval": 1, "load": 1.5},
            '`load` must be "latest", "best:METRIC", a step, a path or None, but is 1.5 (float).',
        ),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            CheckpointingHook(**kwargs)  # type: ignore[arg-type]
