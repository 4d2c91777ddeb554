"""`trainloop runs` and `trainloop diff`: what the account of a run is shown as."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trainloop.__main__ import main
from trainloop.account.goodput import CATEGORIES, goodput
from trainloop.account.lives import Life
from trainloop.account.survey import survey_runs
from trainloop.testing.kills import KillAt
from trainloop.testing.lives import live

from .workers.account import Regression, Slow

GAP = 0.5


class Made(NamedTuple):
    """Runs that were made once for all tests."""

    folder: Path
    wall: float
    """Seconds that the lives of the first run took, seen from outside."""

    def __getitem__(self, name: str) -> Path:  # type: ignore[override]
        return self.folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run of three lives, with slow data and evaluations, and runs to compare."""
    folder = tmp_path_factory.mktemp("runs")
    start = time.time()
    live(Slow, folder / "killed", KillAt(17, "on_after_step"))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        live(partial(Slow, fails_at=27), folder / "killed")
    time.sleep(GAP)
    live(partial(Slow, changed=7), folder / "killed")
    wall = time.time() - start
    live(Regression, folder / "a")
    live(Regression, folder / "same", KillAt(27, "on_after_step"))
    live(Regression, folder / "same")
    live(partial(Regression, changed=7), folder / "changed")
    live(partial(Regression, lr=2e-2), folder / "rate")
    live(partial(Regression, batch_size=2), folder / "ranks", num_processes=2)
    return Made(folder, wall)


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_lives_of_a_run_are_shown(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Each life with its steps, its end, and what the ledger says of the steps that it did again."""
    code, out, _ = shown(capsys, "runs", made["killed"])
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "The run: 3 lives, at step 30 of 30, complete"
    first, second, third = lines[3:6]
    assert first.endswith("killed: its end was not recorded")
    assert "10 → 26" in second
    assert ": the same " in second
    assert second.endswith("error: ValueError: broken on purpose (rank 0)")
    assert "20 → 30  21 to 26: loss differs in step " in third
    assert third.endswith(", rank 0  complete")


def test_every_second_is_sorted(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The categories add up to the time from the first start to the last end, and have what was spent on purpose."""
    code, out, _ = shown(capsys, "runs", made["killed"], "--json")
    (run,) = json.loads(out)
    seconds = run["seconds"]
    assert code == 0
    assert list(seconds) == list(CATEGORIES)
    assert sum(seconds.values()) == pytest.approx(run["whole_seconds"], rel=0.02)
    assert run["whole_seconds"] <= made.wall * 1.02
    lasted = sum(life["ended"] - life["started"] for life in run["lives"])
    assert seconds["dead"] == pytest.approx(run["whole_seconds"] - lasted, rel=0.02, abs=0.01)
    assert seconds["dead"] >= GAP
    assert seconds["evaluating"] >= 3 * Slow.SECONDS
    assert seconds["waiting for data"] >= 30 * Slow.SECONDS / 10
    assert seconds["saving"] > 0
    assert seconds["done again"] > 0
    assert 0 < run["goodput"] < 1
    assert [life["reason"] for life in run["lives"]] == ["killed", "error", "complete"]


def test_a_run_that_goes_on_is_told_to(made: Made, tmp_path: Path) -> None:
    """A life without an end is "running" as long as its process is there, and "killed" after it."""
    (tmp_path / "events.jsonl").write_text((made["a"] / "events.jsonl").read_text())
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()][:-1]

    def reason(**changed: Any) -> str:
        events[0] |= changed
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        ((life,),) = survey_runs(tmp_path)
        return life.reason

    assert reason(pid=2**22 + 1) == "killed"
    assert reason(pid=os.getpid()) == "killed", "another process has the number now"
    from trainloop.account.process import process_start

    assert reason(started=process_start(os.getpid())) == "running"
    assert reason(host="elsewhere") == "killed"


@pytest.mark.parametrize("arguments", [["run.png"], ["run.svg", "--dark"]])
def test_a_run_is_drawn(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """A picture is written in the form that its name asks for; other names are refused."""
    pytest.importorskip("matplotlib")
    path = tmp_path / arguments[0]
    assert shown(capsys, "runs", made["killed"], "--plot", path, *arguments[1:])[0] == 0
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    code, _, err = shown(capsys, "runs", made["killed"], "--plot", tmp_path / "run.gif")
    assert (code, ".png or .svg" in err) == (2, True)


def test_a_folder_without_an_account_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message says what is missing."""
    code, _, err = shown(capsys, "runs", tmp_path)
    assert (code, "has no account of a run: its events.jsonl is missing or empty" in err) == (2, True)
    code, _, err = shown(capsys, "diff", tmp_path, tmp_path)
    assert (code, "has no ledger of a run" in err) == (2, True)


def test_two_runs_with_the_same_seed_are_the_same(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if one of them was killed and resumed."""
    code, out, _ = shown(capsys, "diff", made["a"], made["same"])
    assert code == 0
    assert "The runs are the same in all 30 steps that both have, bit by bit" in out
    assert "Their settings are the same." in out


def test_the_first_step_that_differs_is_named(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """With the quantity, the rank and the settings that differ."""
    code, out, _ = shown(capsys, "diff", made["a"], made["changed"])
    assert code == 1
    assert "rank 0: the loss: " in out
    code, out, _ = shown(capsys, "diff", made["a"], made["rate"])
    assert code == 1
    assert "The first difference is in step 1, rank 0: the learning rates." in out
    assert "optimizer/0/lr  0.01  0.02" in out
    code, out, _ = shown(capsys, "diff", made["a"], made["ranks"])
    assert code == 1
    assert "A was run by 1 processes, B by 2" in out
    assert "gradient norm: " in out
    code, out, _ = shown(capsys, "diff", made["a"], made["rate"], "--json")
    told = json.loads(out)
    assert (told["found"]["step"], told["quantity"]) == (1, "learning rates")
    assert told["settings"]["optimizer/0/lr"] == [0.01, 0.02]


def life(number: int, times: tuple[float, float, float], steps: tuple[int, int], *events: dict[str, Any]) -> Life:
    started, ready, ended = times
    return Life(
        number, started, started, {}, 1, "", ready=ready, ended=ended, start_step=steps[0], step=steps[1],
        events=[{"event": "start", "time": ready}, *events],
    )  # fmt: skip


def test_the_seconds_of_a_life_that_is_known_by_heart() -> None:
    """Steps done again end with the event that says so; what was saved and evaluated meanwhile is not counted twice."""
    first = life(1, (0, 10, 110), (0, 100), {"event": "save", "time": 60, "seconds": 5, "step": 50})
    second = life(
        2, (120, 125, 225), (50, 150),
        {"event": "evaluation", "time": 140, "seconds": 4, "step": 60},
        {"event": "again", "time": 175, "step": 100, "data_seconds": 6},
        {"event": "end", "time": 225, "step": 150, "data_seconds": 10},
    )  # fmt: skip
    assert goodput([first, second]) == {
        "training": 95 + 40,
        "done again": 40,
        "saving": 5,
        "evaluating": 4,
        "waiting for data": 16,
        "starting": 15,
        "dead": 10,
    }
    short = life(3, (230, 231, 241), (150, 150))
    never = life(4, (250, 260, 260), (0, 0))
    never.ready = None
    seconds = goodput([first, second, short, never])
    assert (seconds["dead"], seconds["starting"]) == (10 + 5 + 9, 15 + 1 + 10)
