"""The account of a run: its events file, its lives."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainloop import BaseHook, CheckpointingHook, EvaluationHook
from trainloop.account import Life, failure_times, failures_at_same_step, read_events, read_lives
from trainloop.account.lives import split_runs
from trainloop.testing.kills import KillAt
from trainloop.testing.lives import live

from .small import SmallTrainer
from .workers.account import Regression


class At(BaseHook):
    """Does something at a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_before_optimizer_step(self, trainer: Any) -> None:
        if trainer.step == self.step:
            self.action(trainer)


def small(workspace: Path | None, *hooks: BaseHook, max_steps: int = 6, **kwargs: Any) -> SmallTrainer:
    options = {key: kwargs.pop(key) for key in ("exit_signals", "path", "async_save") if key in kwargs}
    checkpointing = CheckpointingHook(interval=2, **options)
    return SmallTrainer(max_steps, workspace=workspace, hooks_=lambda self: [*hooks, checkpointing], **kwargs)


def fail(trainer: Any) -> None:
    raise ValueError("the sample is broken\nin a way that takes two lines")


def test_the_events_of_lives_that_end_in_every_way(tmp_path: Path) -> None:
    """A life that fails, one that gets a signal, one that is stopped, and one that completes say so, with the step."""
    began = time.time()
    with pytest.raises(ValueError, match="broken"):
        small(tmp_path, At(4, fail)).train()
    with pytest.raises(SystemExit):
        small(tmp_path, At(4, lambda _: os.kill(os.getpid(), signal.SIGTERM)), exit_signals="SIGTERM").train()
    small(tmp_path, At(6, lambda trainer: trainer.request_stop("enough")), max_steps=8).train()
    small(tmp_path, max_steps=9).train()
    failed, signalled, stopped, complete = read_lives(tmp_path)
    assert (failed.reason, failed.detail) == (
        "error",
        "ValueError: the sample is broken (rank 0)",
    )
    assert (failed.start_step, failed.step, failed.failed_step) == (0, 3, 4)
    assert (signalled.reason, signalled.detail, signalled.start_step) == ("signal", "SIGTERM", 2)
    assert (stopped.reason, stopped.detail, stopped.start_step, stopped.step) == ("stopped", "enough", 5, 7)
    assert (complete.reason, complete.start_step, complete.step, complete.max_steps) == ("complete", 7, 9, 9)
    assert [life.number for life in (failed, signalled, stopped, complete)] == [1, 2, 3, 4]
    for life in (failed, signalled, stopped, complete):
        assert (sum(life.hosts.values()), life.num_processes, life.settings["seed"]) == (1, 1, 0)
        assert life.started <= life.begun <= (life.ready or 0) <= life.ended <= time.time()
        assert life.begun >= began
    saves = [event["step"] for event in complete.events if event["event"] == "save"]
    assert saves == [8, 9]
    assert [len(run) for run in split_runs(read_lives(tmp_path))] == [4]
    assert failure_times([failed, signalled, stopped, complete]) == [failed.ended]


def test_evaluations_waits_retries_and_async_saves_are_events(tmp_path: Path) -> None:
    """The seconds of evaluations and saves, and the windows that were discarded, are written with their step."""
    is_bad = [True]

    def forward(trainer: Any, batch: Any) -> Any:
        scale = float("nan") if trainer.step == 3 and trainer.model.training and is_bad and is_bad.pop() else 1.0
        return trainer.model(batch[0]).pow(2).mean() * scale, {}

    data = SmallTrainer().build_data_loader()
    small(tmp_path, EvaluationHook(5, data_loader=data, at_end=False), forward_=forward, async_save=True).train()
    events = read_events(tmp_path)
    by_kind = {kind: [e for e in events if e["event"] == kind] for kind in {event["event"] for event in events}}
    assert [(e["step"], e["retries"]) for e in by_kind["discarded"]] == [(3, 1)]
    assert [e["step"] for e in by_kind["evaluation"]] == [5]
    assert by_kind["evaluation"][0]["seconds"] > 0
    assert [(e["step"], e["durable"]) for e in by_kind["save"]] == [(2, False), (4, False), (6, True)]
    assert [e["step"] for e in by_kind["durable"]] == [2, 4]
    assert all(e["seconds"] > 0 for e in [*by_kind["save"], *by_kind["durable"]])
    assert all(e["data_seconds"] > 0 for e in by_kind["save"])


def test_a_torn_line_hides_no_other(tmp_path: Path) -> None:
    """A line that a killed process left unfinished is passed over, and the next life cuts it off."""
    small(tmp_path, max_steps=2).train()
    path = tmp_path / "events.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:-1], whole[-1][:20]]))
    (killed,) = read_lives(tmp_path)
    assert (killed.reason, killed.step) == ("killed", 2)
    small(tmp_path, max_steps=4).train()
    assert [life.reason for life in read_lives(path)] == ["killed", "complete"]
    assert sum(1 for line in path.read_text().splitlines() if not _is_json(line)) == 0


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_a_run_goes_on_if_its_events_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that takes no event ends no run; it is told once."""
    (tmp_path / "events.jsonl").mkdir()
    trainer = small(tmp_path)
    trainer.train()
    assert trainer.step == 6
    assert sum("this run is not recorded" in record.getMessage() for record in caplog.records) == 1
    alone = small(None, path=tmp_path / "elsewhere")
    alone.train()
    assert alone.step == 6
    assert not (tmp_path / "elsewhere" / "events.jsonl").exists()


def test_a_new_run_in_an_old_workspace_is_another_run(tmp_path: Path) -> None:
    """A life that starts at step 0 belongs to the run before only if that had no checkpoint yet."""
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            small(tmp_path, At(2, fail)).train()
    small(tmp_path).train()
    os.rename(tmp_path / "checkpoints", tmp_path / "old")
    small(tmp_path).train()
    assert [[life.number for life in run] for run in split_runs(read_lives(tmp_path))] == [[1, 2, 3], [4]]


def test_an_events_file_that_makes_no_sense_ends_no_run(tmp_path: Path) -> None:
    """A run whose first lives are missing in the file, or whose events have other types, goes on."""
    small(tmp_path).train()
    (tmp_path / "events.jsonl").unlink()
    small(tmp_path, max_steps=8).train()
    assert [(life.start_step, life.step) for life in read_lives(tmp_path)] == [(6, 8)]
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "begin", "time": 0, "life": 2, "started": "early"}\n')
    trainer = small(tmp_path, max_steps=9)
    trainer.train()
    assert trainer.step == 9


def test_failures_at_the_same_step_are_counted() -> None:
    """Only lives in a row up to the last one count, and only those that failed at one step."""

    def life(number: int, step: int, reason: str = "error") -> Life:
        failures = [{"event": "failed", "step": step}] if reason == "error" else []
        about: dict[str, Any] = {"hosts": {}, "num_processes": 1, "version": "", "failures": failures}
        return Life(number, 0.0, 0.0, step=step - 1, reason=reason, **about)

    assert failures_at_same_step([]) == (0, 0)
    assert failures_at_same_step([life(1, 7), life(2, 7), life(3, 7, "complete")]) == (0, 0)
    assert failures_at_same_step([life(1, 7), life(2, 9), life(3, 9, "killed"), life(4, 9)]) == (9, 3)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_life_that_was_killed_has_no_end(tmp_path: Path, num_processes: int) -> None:
    """A SIGKILL of rank 0 leaves a life without a reason, whose step is known from what it wrote; the next goes on."""
    workspace = tmp_path / "run"
    live(Regression, workspace, KillAt(17, "on_after_step"), num_processes=num_processes)
    live(Regression, workspace, num_processes=num_processes)
    killed, complete = read_lives(workspace)
    assert (killed.reason, killed.detail, killed.num_processes) == ("killed", "", num_processes)
    assert killed.step >= 10
    assert (complete.reason, complete.start_step, complete.step) == ("complete", 10, 30)
    assert complete.started >= killed.ended


def test_the_rank_that_failed_is_the_cause(tmp_path: Path) -> None:
    """An exception on rank 1 alone is in the account, with its rank and step."""
    workspace = tmp_path / "run"
    with pytest.raises(RuntimeError, match="broken on rank 1"):
        live(partial(Regression, fails_at=7), workspace, num_processes=2)
    (life,) = read_lives(workspace)
    assert (life.reason, life.detail) == ("error", "ValueError: broken on rank 1 (rank 1)")
    assert (life.failed_step, [event["rank"] for event in life.failures if not event["lost_contact"]]) == (7, [1])
