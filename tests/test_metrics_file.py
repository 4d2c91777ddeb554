"""The metrics file has each number of each step once, whenever the run is killed, and pandas reads it at any time."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from trainloop import BaseHook, CheckpointingHook, LoggingHook, MetricsFileHook
from trainloop.account.metrics import MetricsFile, read_metrics

from .launching import REPOSITORY, environment
from .small import SmallTrainer
from .workers.tracking import IMAGES_EVERY, LAST_STEP, VALIDATE_EVERY

FORMATS = ("jsonl", "csv")


class Log(BaseHook):
    """Logs `of(step)` after each step where it is not None, and after `then` hooks have been told of the step."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def on_after_step(self, trainer: Any) -> None:
        records = self.of(trainer.step)
        if records is not None:
            trainer.log(records)


def train(workspace: Path, *hooks: BaseHook, steps: int = 3) -> SmallTrainer:
    trainer = SmallTrainer(steps, workspace=workspace, hooks_=lambda self: list(hooks))
    trainer.train()
    return trainer


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.endswith("time")} for row in rows]


def life(workspace: Path, format: str, how: str, step: int) -> None:
    """One process of the run."""
    command = [sys.executable, str(REPOSITORY / "tests/workers/tracking.py"), str(workspace), format, how, str(step)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if how == "never" else -signal.SIGKILL), done.stderr[-4000:]


@pytest.mark.parametrize("format", ["jsonl", pytest.param("csv", marks=pytest.mark.slow)])
def test_each_step_is_there_once_however_often_the_run_is_killed(tmp_path: Path, format: str) -> None:
    """Killed before its first checkpoint and again later, with torn lines: the rows are those of one run."""
    file = tmp_path / "killed" / f"metrics.{format}"
    life(tmp_path / "killed", format, "kill", 3)
    with file.open("a") as opened:
        opened.write('{"step": 3, "tim' if format == "jsonl" else "3,17643")
    life(tmp_path / "killed", format, "kill", 17)
    last = int(file.read_text().splitlines()[-1].removeprefix('{"step": ').partition(",")[0])
    assert last == 16, "step 17 was killed before its row was whole"
    with file.open("a") as opened:
        opened.write('{"step": 17, "time": 1.5, "train/lo' if format == "jsonl" else "17,1.5,0.0")
    life(tmp_path / "killed", format, "never", 0)
    rows = read_metrics(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(1, LAST_STEP + 1))
    shown = list(range(IMAGES_EVERY, LAST_STEP + 1, IMAGES_EVERY))
    histograms, texts = (pd.read_json(file.with_name(f"{name}.jsonl"), lines=True) for name in ("histograms", "texts"))
    assert list(histograms["step"]) == shown
    assert [sum(counts) for counts in histograms["counts"]] == shown
    assert list(texts["text"]) == [f"<step> {step}\n" for step in shown]
    assert (texts["name"] == "words/of").all()
    assert [row["step"] for row in rows if "val/twice" in row] == list(range(4, LAST_STEP + 1, VALIDATE_EVERY))
    validate = Log(lambda step: {"val": {"twice": 2.0 * step}} if step % VALIDATE_EVERY == 0 else None)
    train(tmp_path / "once", LoggingHook(1), MetricsFileHook(format), validate, steps=LAST_STEP)
    assert without_time(rows) == without_time(read_metrics(tmp_path / "once"))


@pytest.mark.parametrize("format", FORMATS)
def test_pandas_reads_the_file_after_every_step(tmp_path: Path, format: str) -> None:
    """Columns that come later are empty before; NaN and infinities are what they were."""
    seen: list[Any] = []
    numbers: dict[int, Any] = {
        1: {"a": 1.5, "list": [1, True]},
        2: {"a": math.nan},
        3: {"a": math.inf, 'b,"c"': torch.tensor(-math.inf)},
        5: {"late": {"x": 1e-30}},
    }

    class Read(BaseHook):
        def on_before_step(self, trainer: Any) -> None:
            if trainer.step > 1:
                file = trainer.workspace / f"metrics.{format}"
                seen.append(pd.read_csv(file) if format == "csv" else pd.read_json(file, lines=True))

    train(tmp_path, MetricsFileHook(format), Log(numbers.get), Read(), steps=6)
    assert [list(frame["step"]) for frame in seen] == [[1], [1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3, 5]]
    last = seen[-1]
    assert set(last.columns) == {"step", "time", "a", "list/0", "list/1", 'b,"c"', "late/x"}
    assert [repr(float(value)) for value in last["a"]] == ["1.5", "nan", "inf", "nan"]
    assert [repr(float(value)) for value in last['b,"c"']] == ["nan", "nan", "-inf", "nan"]
    assert last["late/x"].tolist()[3] == 1e-30
    assert [column.dtype.kind for column in (seen[0]["a"], last["late/x"])] == ["f", "f"]
    rows = read_metrics(tmp_path)
    assert [sorted(row.keys() - {"step", "time"}) for row in rows] == [
        ["a", "list/0", "list/1"],
        ["a"],
        ["a", 'b,"c"'],
        ["late/x"],
    ]
    assert rows[0]["list/1"] == 1


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_logged_after_the_last_step_joins_its_row(tmp_path: Path, format: str) -> None:
    """And what is logged before the first step is row 0."""

    class Before(BaseHook):
        def on_before_train(self, trainer: Any) -> None:
            trainer.log({"before": 1})

    trainer = train(tmp_path, Before(), Log(lambda step: {"a": step / 7, "step": 0.5}), MetricsFileHook(format))
    trainer.log({"test": {"loss": 0.25}})
    trainer.log({"test": {"more": 0.125}})
    expected: list[dict[str, Any]] = [{"step": 0, "before": 1}]
    expected += [{"step": step, "a": step / 7, "logged/step": 0.5} for step in (1, 2, 3)]
    expected[-1] |= {"test/loss": 0.25, "test/more": 0.125}
    assert without_time(read_metrics(tmp_path)) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_that_is_loaded_cuts_off_what_comes_after_it(tmp_path: Path, format: str) -> None:
    """`load_state_dict` in a hook: the steps that are done again are there once."""

    class Back(BaseHook):
        state: Any = None

        def on_after_step(self, trainer: Any) -> None:
            if trainer.step == 2 and self.state is None:
                self.state = trainer.state_dict()
            elif trainer.step == 5 and self.state:
                trainer.load_state_dict(self.state)
                self.state = {}

    file = MetricsFileHook(format)
    train(tmp_path, Log(lambda step: {"a": step}), file, Back(), CheckpointingHook(100), steps=6)
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path)] == [(n, n) for n in range(1, 7)]


@pytest.mark.parametrize("format", FORMATS)
def test_a_new_run_in_the_same_workspace_sets_the_file_aside(tmp_path: Path, format: str) -> None:
    """One that begins at step 0."""
    train(tmp_path, Log(lambda step: {"first": step}), MetricsFileHook(format))
    train(tmp_path, Log(lambda step: {"second": step}), MetricsFileHook(format))
    assert [row.get("second") for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [row.get("first") for row in read_metrics(tmp_path / f"metrics.old.{format}")] == [1, 2, 3]


def test_a_disk_that_refuses_a_row_gets_it_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on, the log says when it began and ended, and no row is lost."""
    path = tmp_path / "metrics.jsonl"

    class Disk(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            if trainer.step == 2:
                path.rename(tmp_path / "away")
                path.mkdir()
            elif trainer.step == 5:
                path.rmdir()
                (tmp_path / "away").rename(path)

    with caplog.at_level("INFO", "trainloop"):
        train(tmp_path, MetricsFileHook(), Log(lambda step: {"a": step}), Disk(), steps=7)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert re.search(r"Step 3: The metrics file failed\. Training continues\..*Is a directory", caplog.text)
    assert "The metrics file works again." in caplog.text


def test_only_whole_lines_count(tmp_path: Path) -> None:
    """A file that is damaged in the middle keeps its other rows; one that was changed by hand is appended to."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "a": 1}\n{"step": 2, "a\n\0\0\0\n[3]\n{"step": 4, "a": 4}\n{"step": 5, "a": 5}\n{"st')
    metrics = MetricsFile(tmp_path, "jsonl")
    assert metrics.open(4) == 1
    metrics.put(4, {"b": 2})
    file.write_text('{"step": 1, "a": 1}\n')
    metrics.put(4, {"c": 2})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 4]
    assert {"a": 4, "b": 2, "c": 2}.items() <= rows[1].items()
    (tmp_path / "other").mkdir()
    table = MetricsFile(tmp_path / "other", "csv")
    table.put(1, {"a": 1})
    table.path.unlink()
    table.put(2, {"a": 2})
    assert table.path.read_text().startswith("step,time,a\n2,")
    assert json.loads(file.read_text().splitlines()[0])["a"] == 1
    with table.path.open("a") as opened:
        opened.write("3,1.5,7\n4,1.5,8\n3,1")  # two steps that are done again, and a torn line
    again = MetricsFile(tmp_path / "other", "csv")
    assert again.open(2) == 2
    again.put(2, {"late": 5})
    assert [(row["step"], row["a"], row["late"]) for row in read_metrics(tmp_path / "other")] == [(2, 2, 5)]


def test_what_the_hook_refuses_and_what_a_dry_run_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At construction or before the first step; a dry run writes nothing."""
    with pytest.raises(ValueError, match=re.escape("`format` must be one of ('jsonl', 'csv'), but is 'json'.")):
        MetricsFileHook("json")
    with pytest.raises(ValueError, match="MetricsFileHook writes to `workspace`, but it is None"):
        SmallTrainer(1, hooks_=lambda self: [MetricsFileHook()]).train()
    with pytest.raises(ValueError, match="that both write metrics into the workspace"):
        train(tmp_path, MetricsFileHook(), MetricsFileHook("csv"))
    trainer = train(tmp_path, MetricsFileHook())
    with caplog.at_level("INFO", "trainloop"):
        trainer.log({"a": {"b": 1}}, dry_run=True)
    assert "Would write to metrics.jsonl at step 3: {'a/b': 1}." in caplog.text
    assert read_metrics(tmp_path) == []
