"""A run that must be over at a time is saved before it; and how often to save costs least."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from trainloop import CheckpointingHook
from trainloop.account import read_lives
from trainloop.checkpoint import Checkpoint
from trainloop.hooks import save_timing
from trainloop.hooks.deadline import Deadline, end_time
from trainloop.hooks.save_timing import best_interval

from .launching import REPOSITORY, launch
from .small import SmallTrainer

SCONTROL = """#!/bin/sh
[ "$*" = "show job 7" ] || exit 1
end=$(date -d "+10 seconds" +%Y-%m-%dT%H:%M:%S)
echo $end >> {asked}
echo "JobId=7 JobName=train
   RunTime=00:00:20 TimeLimit=00:01:00
   StartTime=2026-11-26T10:00:00 EndTime=$end Deadline=N/A"
"""


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for Slurm; returns the file of the answers that it has given."""
    asked, scontrol = folder / "asked", folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL.format(asked=asked))
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return asked


def test_the_last_save_is_durable_before_the_end_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, async saves that take more than 2 s, and Slurm is asked once. The run ends by itself with a
    whole checkpoint and the code of SIGTERM; the launcher does not restart it.
    """
    asked = slurm(tmp_path, monkeypatch)
    worker = REPOSITORY / "tests" / "workers" / "deadline.py"
    done = launch(worker, "ddp2", str(tmp_path), launch_args=["--max_restarts", "2"], check=False)
    assert done.returncode == 1
    assert [(tmp_path / f"code.{rank}").read_text() for rank in (0, 1)] == ["143", "143"], done.stdout[-3000:]
    assert len(list(tmp_path.glob("life.0.*"))) == 1
    (end,) = asked.read_text().split()
    (life,) = read_lives(tmp_path)
    assert life.reason == "deadline"
    assert re.search(
        rf"The deadline is near: saved after step {life.step} in \S+, exiting with code 143\.", done.stdout
    )
    saved = Checkpoint.open(tmp_path / "checkpoints" / f"step_{life.step:07d}")
    assert not saved.find_problems()
    assert saved.manifest.time < datetime.fromisoformat(end).timestamp()
    assert sum(event["event"] == "save" for event in life.events) > 1


def test_a_deadline_may_be_given_in_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start of the process, as a time, or asked of Slurm, by the environment first."""
    assert 0 < time.time() + 3600 - end_time(timedelta(hours=1)) < 3600
    assert end_time(datetime(2026, 11, 26).astimezone()) == datetime(2026, 11, 26).timestamp()
    asked = slurm(tmp_path, monkeypatch)
    assert 8 < end_time("slurm") - time.time() < 11
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    assert end_time("slurm") == 1.8e9
    assert len(asked.read_text().split()) == 1


def test_what_is_no_deadline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At construction; and when Slurm doesn't answer."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match='`deadline` is "slurm", but this process is not part of a Slurm job'):
        CheckpointingHook(5, deadline="slurm")
    with pytest.raises(TypeError, match='`deadline` must be a timedelta, a datetime, "slurm" or None, but is 60'):
        CheckpointingHook(5, deadline=60)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`deadline` must be after the start of the process"):
        CheckpointingHook(5, deadline=timedelta(0))
    with pytest.raises(TypeError, match="`save_every` must be a positive timedelta, \"auto\" or None, but is 'often'"):
        CheckpointingHook(5, save_every="often")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ValueError, match=r"Slurm does not tell when the job ends.*scontrol show job 7"):
        end_time("slurm")


def test_a_run_without_a_save_so_far_ends_in_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A deadline that has passed ends the run after one step, saved; the log told it at the start."""
    hook = CheckpointingHook(10**6, deadline=datetime.now() - timedelta(seconds=5), exit_code=3)
    with caplog.at_level("INFO", "trainloop"), pytest.raises(SystemExit, match="3"):
        SmallTrainer(100, workspace=tmp_path, hooks_=lambda self: [hook]).train()
    assert any(text.endswith(" s.") and "The run must end by" in text for text in caplog.messages)
    assert (tmp_path / "checkpoints" / "step_0000001").exists()


def test_a_deadline_is_near_when_one_more_step_would_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the longest time between two looks and by what a save takes; the time of a save itself does not count."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1000.0 + now[0])
    deadline = Deadline(1100.0, lambda: 20.0)

    def look(at: float) -> bool:
        now[0] = at
        return deadline.is_near()

    assert [look(at) for at in (0.0, 5.0, 10.0, 15.0)] == [False] * 4
    deadline.skip()
    assert [look(at) for at in (60.0, 65.0, 70.0)] == [False, False, True]


def test_the_best_interval_loses_least() -> None:
    """Young's: an hour between failures and saves of 18 s give six minutes; both longer and shorter ones lose more."""
    assert best_interval(18.0, 3600.0) == 360.0

    def lost(interval: float) -> float:
        return 18.0 / interval + interval / 2 / 3600

    assert lost(360.0) < min(lost(300.0), lost(430.0))


def test_auto_saves_by_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the lives before: what saves have cost, and how often they have failed. It is told, and done."""
    events: list[dict[str, Any]] = []
    for life in range(1, 10):
        at = {"time": 1000.0 + life, "life": life}
        events += [
            {"event": "begin", **at},
            {"event": "start", "step": 0, **at},
            {"event": "save", "step": 1, "seconds": 0.1, "durable": True, **at},
            {"event": "failed", "step": 2, "rank": 0, "error": "ValueError", **at, "time": at["time"] + 0.1},
        ]
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    monkeypatch.setattr(save_timing, "_PRIOR_SECONDS", 0.5)

    def forward(trainer: Any, batch: Any) -> Any:
        time.sleep(0.02)
        return trainer.model(batch[0]).pow(2).mean(), {}

    hook = CheckpointingHook(10**6, keep_interval=1, save_every="auto")
    trainer = SmallTrainer(60, workspace=tmp_path, hooks_=lambda self: [hook], forward_=forward)
    with caplog.at_level("INFO", "trainloop"):
        trainer.train()
    assert (
        "Saving about every 0:00:01, which loses the least time: a save blocks the run for 0.10 s, and the run failed 9"
        in caplog.text
    )
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) > 2
