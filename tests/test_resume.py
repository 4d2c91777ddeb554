"""Killed anywhere, resumed exactly: the run ends with every bit of a run that was never killed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trainloop import CheckpointError, CheckpointingHook

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer

WORKER = REPOSITORY / "tests" / "workers" / "resume.py"
LAST = "13"


def life(
    workspace: Path,
    form: str,
    how: str = "never",
    step: int = 0,
    rank: int = 0,
    workers: int = 0,
    is_async: bool = False,
) -> str:
    """One life of the run; returns what it printed."""
    arguments = [str(workspace), LAST, str(workers), str(int(is_async)), how, str(step), str(rank)]
    done = launch(WORKER, form, *arguments, check=False)
    assert (done.returncode == 0) == (how == "never"), done.stdout[-4000:]
    return done.stdout


def results(workspace: Path, form: str) -> list[Any]:
    return [json.loads((workspace / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES[form])]


def logged(workspace: Path, form: str) -> list[dict[int, Any]]:
    """What each rank logged, by step; a step that a killed life had logged already is the same again."""
    ranks = []
    for rank in range(NUM_PROCESSES[form]):
        steps: dict[int, Any] = {}
        for line in (workspace / f"log.{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert steps.setdefault(row["step"], row) == row
        ranks.append(steps)
    return ranks


@pytest.mark.parametrize(
    ("form", "workers", "is_async"),
    [("single", 0, False), ("single", 2, True), ("ddp2", 2, False), ("fsdp2", 0, True)],
)
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, form: str, workers: int, is_async: bool) -> None:
    """Killed twice and terminated once, in mid-epoch and mid-interval, on different ranks: weights, optimizer,
    schedule, BatchNorm, random generators, data position and all that was logged are the same, bit for bit.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    other = NUM_PROCESSES[form] - 1
    life(whole, form, workers=workers, is_async=is_async)
    life(killed, form, "kill", 4, other, workers, is_async)
    output = life(killed, form, "term", 7, other, workers, is_async)
    assert re.search(r"Resumed from .*: the run goes on after step [02]\.", output) or is_async, output[-3000:]
    assert "SIGTERM was received: saved after step" in output
    life(killed, form, "kill", 11, 0, workers, is_async)
    life(killed, form, workers=workers, is_async=is_async)
    assert results(killed, form) == results(whole, form)
    assert [set(steps) for steps in logged(whole, form)] == [{5, 10}] * NUM_PROCESSES[form]
    assert logged(killed, form) == logged(whole, form)
    kept = sorted(path.name for path in (killed / "checkpoints").glob("step_*"))
    assert kept == ["step_0000012", "step_0000013"]


def test_a_run_may_go_on_at_another_number_of_processes(tmp_path: Path) -> None:
    """FSDP2 with two processes, then DDP with two, then one: each takes up what the one before has saved."""
    life(tmp_path, "fsdp2", "kill", 5, 1)
    output = life(tmp_path, "ddp2", "kill", 9, 1)
    assert "the run goes on after step 4." in output
    output = life(tmp_path, "single")
    assert "the run goes on after step 8." in output
    assert "The checkpoint was saved by 2 processes, and there are now 1" in output
    assert results(tmp_path, "single")[0]["step"] == int(LAST)


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
        ({"interval": 1, "load": 1.5}, '`load` must be "latest", a step, a path or None, but is 1.5 (float).'),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            CheckpointingHook(**kwargs)  # type: ignore[arg-type]
