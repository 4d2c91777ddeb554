"""W&B shows one run with each step once, whatever happens to the processes, and never ends training itself."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from trainloop import BaseHook, CheckpointingHook, LoggingHook, WandbHook
from trainloop.hooks import wandb_files

from .launching import REPOSITORY, environment, launch
from .small import SmallTrainer
from .wandb_server import WandbServer
from .workers.tracking import IMAGES_EVERY, LAST_STEP, VALIDATE_EVERY, make

WORKER = REPOSITORY / "tests" / "workers" / "tracking.py"
TIMES = ("train/step_time", "train/data_time")


class Told(BaseHook):
    """What `trainer.log` was told, by step."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}

    def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
        flat = {f"{k}/{name}": value for k, group in records.items() for name, value in group.items()}
        self.rows.setdefault(trainer.step, {}).update(flat)

    def on_log_histogram(self, trainer: Any, records: Any, dry_run: bool) -> None:
        pass

    def on_log_text(self, trainer: Any, records: Any, dry_run: bool) -> None:
        pass

    def on_log_images(self, trainer: Any, records: Any, dry_run: bool) -> None:
        """Hears of the images, and keeps none."""


def life(workspace: Path, how: str, step: int, **env: str) -> str:
    """One process of the run; returns what it printed."""
    command = [sys.executable, str(WORKER), str(workspace), "wandb", how, str(step)]
    given = environment(**{"WANDB_MODE": "offline", "WANDB_SILENT": "true", **env})
    done = subprocess.run(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    expected = {"never": 0, "kill": -signal.SIGKILL, "raise": 1, "term": 128 + signal.SIGTERM}[how]
    assert done.returncode == expected, done.stdout[-4000:]
    return done.stdout


def folders(workspace: Path) -> list[Path]:
    """Those of the run's processes, the oldest first."""
    return sorted(workspace.glob("wandb/*run-*"), key=lambda folder: folder.name.partition("run-")[2])


def rows_of(workspace: Path) -> list[dict[str, Any]]:
    """What W&B's files hold of the one run, without what wandb adds."""
    wandb.teardown()  # it may write them after a run's end
    files = [file for folder in folders(workspace) for file in folder.glob("*.wandb")]
    assert len({file.name for file in files}) == 1, files
    return [{k: v for k, v in row.items() if not k.startswith("_")} for file in files for row in wandb_files.rows(file)]


def records_of(folder: Path) -> list[Any]:
    wandb.teardown()
    (file,) = folder.glob("*.wandb")
    with file.open("rb") as opened:
        return [Record.FromString(content) for content in wandb_files._records(opened)]


def unbroken_rows(tmp_path: Path) -> dict[int, dict[str, Any]]:
    """What the worker logs in a single life, without the times."""
    told = Told()
    make(str(tmp_path / "unbroken"), [told]).train()
    return {step: {k: v for k, v in row.items() if k not in TIMES} for step, row in told.rows.items()}


def assert_each_step_once(history: list[dict[str, Any]], unbroken: dict[int, dict[str, Any]]) -> None:
    assert [row["trainer/step"] for row in history] == list(range(1, LAST_STEP + 1))
    for row in history:
        step = row["trainer/step"]
        expected = dict(unbroken[step])
        groups = expected.pop("train/lr")
        assert {k: row[k] for k in expected} == expected
        assert row["train/lr/0"] == groups["0"]
        assert ("val/twice" in row) == (step % VALIDATE_EVERY == 0)
        assert set(TIMES) <= set(row)
        names = {"samples/grey", "steps", "words/of"}
        assert names & set(row) == (names if step % IMAGES_EVERY == 0 else set())
        if "steps" in row:
            assert (row["steps"]["_type"], sum(row["steps"]["values"])) == ("histogram", step)


def assert_images_are_there(run: Any) -> None:
    for row in run.history:
        if row["trainer/step"] % IMAGES_EVERY == 0:
            image = Image.open(io.BytesIO(run.uploads[row["samples/grey"]["path"]]))
            assert image.size == (6, 4)
            assert set(image.convert("L").tobytes()) == {row["trainer/step"]}
            text = run.uploads[row["words/of"]["path"]].decode()
            assert text == f"<pre>&lt;step&gt; {row['trainer/step']}\n</pre>"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the variables once in a process, which may have been in another module's test
    yield
    wandb.teardown()


# ---------------------------------------------------------------------- one run


def test_a_run_that_ends_in_every_way_is_one_run_with_each_step_once(tmp_path: Path) -> None:
    """Killed before its first checkpoint, killed again, crashed between two logs of one step, terminated, and finished:
    `wandb sync` brings W&B one run with every step, number, image and key of the config; each end is marked as what it
    was.
    """
    workspace = tmp_path / "run"
    life(workspace, "kill", 3)
    told = life(workspace, "kill", 17)
    assert re.search(r"wandb-run.json says that W&B run \w+ was killed", told)
    assert "RuntimeError: as told" in life(workspace, "raise", 24)
    assert "which has the steps up to 23." in life(workspace, "term", 26)
    life(workspace, "never", 0)
    with WandbServer() as server:
        wandb_command = [sys.executable, "-m", "wandb", "sync", *map(str, folders(workspace))]
        env = environment(**server.environment)
        done = subprocess.run(wandb_command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    ((run_id, run),) = server.runs.items()
    assert json.loads((workspace / "wandb-run.json").read_text()) == {"run_id": run_id, "is_on": False, "config": None}
    assert_each_step_once(run.history, unbroken_rows(tmp_path))
    assert_images_are_there(run)
    assert run.config["data"] == {"value": {"name": "eight", "folders": ["a", "b"]}}
    crashed, preempted, finished = [
        [record for record in records_of(folder) if record.WhichOneof("record_type") in ("exit", "preempting")]
        for folder in folders(workspace)[2:]  # those that were not killed
    ]
    assert [r.exit.exit_code for r in crashed] == [1]
    assert [r.WhichOneof("record_type") for r in preempted] == ["preempting", "exit"]
    assert preempted[1].exit.exit_code == 128 + signal.SIGTERM
    assert [r.exit.exit_code for r in finished] == [0]


def test_a_server_is_asked_what_it_has(tmp_path: Path) -> None:
    """Online, the same: what a killed process did not upload is sent again, what it did is not."""
    with WandbServer() as server:
        life(tmp_path, "kill", 13, **server.environment, STEP_SECONDS="0.2")
        (run,) = server.runs.values()
        sent = len(run.history)
        assert sent > 0
        life(tmp_path, "kill", 22, **server.environment)
        assert len(run.history) >= sent
        life(tmp_path, "never", 0, **server.environment)
        assert list(server.runs.values()) == [run]
    assert_each_step_once(run.history, unbroken_rows(tmp_path))
    assert run.ends[-1] == {"exitcode": 0}


def test_rank_zero_speaks_for_all(tmp_path: Path) -> None:
    """At 2 processes: one run with the means of both, whose id is in each rank's state; and if wandb refuses the run,
    both ranks are told, where one would wait for the other.
    """
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    launch(REPOSITORY / "tests" / "workers" / "wandb_ranks.py", "ddp2", str(tmp_path), env=env)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    (folder,) = folders(tmp_path)
    assert [rank["run_id"] for rank in seen] == [folder.name.split("-")[-1]] * 2
    assert [(row["trainer/step"], row["train/rank"]) for row in rows_of(tmp_path)] == [(2, 0.5), (4, 0.5)]
    assert seen[0]["refusal"] == seen[1]["refusal"]
    assert seen[0]["refusal"].startswith("WandbHook could not start its run: UsageError: Invalid project name 'a/b'")


def test_the_sweep_runs_under_wandbs_agent(tmp_path: Path) -> None:
    """`wandb sweep` and `wandb agent` as in integrations/wandb/sweep.yaml: the agent's parameters reach the script, and
    the sweep's metric, the config and the steps are in the run that the agent has named.
    """
    (tmp_path / "integrations").symlink_to(REPOSITORY / "integrations")
    with WandbServer(sweep_runs={"run7": {"lr": 0.02, "width": 16, "max_steps": 20}}) as server:
        env = environment(**server.environment, WANDB_AGENT_REPORT_INTERVAL="1")
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        for arguments in (
            ["sweep", "--entity", "e", "--project", "p", "integrations/wandb/sweep.yaml"],
            ["agent", "--count", "1", "e/p/s"],
        ):
            command = [sys.executable, "-m", "wandb", *arguments]
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
        assert list(server.runs) == ["run7"], done.stdout + done.stderr
    run = server.runs["run7"]
    assert {key: run.config[key]["value"] for key in ("lr", "width", "max_steps")} == {
        "lr": 0.02,
        "width": 16,
        "max_steps": 20,
    }
    assert [(row["trainer/step"], "val/loss" in row) for row in run.history] == [(10, False), (20, False), (20, True)]
    assert run.ends[-1] == {"exitcode": 0}
    assert (tmp_path / "runs" / "wandb-sweep" / "run7" / "checkpoints" / "step_0000020").is_dir()


@pytest.mark.parametrize("spoil", ["cut", "flipped"])
def test_a_torn_file_is_read_up_to_where_it_is_torn(tmp_path: Path, spoil: str) -> None:
    """Cut off anywhere, or with a byte of it wrong: the rows before are read, and nothing that was not written."""
    with wandb.init(project="p", dir=tmp_path) as run:
        for i in range(1500):
            run.log({"i": i, "text": "x" * (i % 50)})
    wandb.teardown()
    (file,) = folders(tmp_path)[0].glob("*.wandb")
    whole, content = list(wandb_files.rows(file)), file.read_bytes()
    assert [row["i"] for row in whole] == list(range(1500))
    assert len(content) > 3 * 2**15, "several blocks"
    damaged = tmp_path / "damaged"
    counts = []
    for place in [*range(0, len(content), 30011), 2**15 + 3, 2**15 + 7, 2 * 2**15 - 5, 2 * 2**15 + 1]:
        if spoil == "cut":
            damaged.write_bytes(content[:place])
        else:
            damaged.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        rows = list(wandb_files.rows(damaged))
        assert rows == whole[: len(rows)]
        counts.append(len(rows))
    assert min(counts) == 0
    assert max(counts) > 1000


# ---------------------------------------------------------------------- what goes wrong at wandb


def train(tmp_path: Path, hook: WandbHook, *others: BaseHook, max_steps: int = 6, **kwargs: Any) -> SmallTrainer:
    hooks = [LoggingHook(interval=1), *others, hook]
    trainer = SmallTrainer(max_steps, workspace=tmp_path, hooks_=lambda self: hooks, **kwargs)
    trainer.train()
    return trainer


class At(BaseHook):
    """Does something in one step."""

    def __init__(self, step: int, work: Any) -> None:
        self.step, self.work = step, work

    def on_before_step(self, trainer: Any) -> None:
        if trainer.step == self.step:
            self.work()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == "trainloop" and r.levelno >= logging.ERROR]


@pytest.mark.parametrize("num_failures", [1, 1000])
def test_a_failing_wandb_never_ends_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    """It is told once, and what was logged meanwhile is sent as soon as it works again, if ever."""
    log, calls = wandb.Run.log, []

    def failing(self: Any, data: dict[str, Any], **kwargs: Any) -> None:
        calls.append(data)
        if 2 < len(calls) <= 2 + num_failures:
            raise OSError("no space left")
        log(self, data, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", failing)
    with caplog.at_level(logging.INFO, "trainloop"):
        trainer = train(tmp_path, WandbHook("p"))
    assert trainer.step == 6
    steps = [row["trainer/step"] for row in rows_of(tmp_path)]
    told, *at_the_end = errors(caplog)
    assert "Step 4: W&B failed. Training continues. The records of the newest" in told
    assert told.endswith("OSError: no space left")
    works_again = any("W&B works again." in message for message in caplog.messages)
    if num_failures == 1:
        assert (steps, works_again, at_the_end) == ([1, 2, 3, 4, 5, 6], True, [])
    else:
        lost = "[RANK 0] W&B did not recover. Everything logged since step 3 is missing there."
        assert (steps, works_again, at_the_end) == ([1, 2], False, [lost])


def test_wandbs_own_process_may_die(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Killed in mid-run, as for want of memory: it is started again, and the run goes on with each step once."""
    import psutil

    def kill() -> None:
        (service,) = [c for c in psutil.Process().children() if "wandb-core" in " ".join(c.cmdline())]
        service.kill()
        service.wait()

    train(tmp_path, WandbHook("p"), At(4, kill), max_steps=8)
    assert len(errors(caplog)) == 1
    assert [row["trainer/step"] for row in rows_of(tmp_path)] == list(range(1, 9))


# ---------------------------------------------------------------------- what wandb is given


def config_of(folder: Path) -> dict[str, Any]:
    (run,) = [record.run for record in records_of(folder) if record.WhichOneof("record_type") == "run"]
    return {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}


def run_of(folder: Path) -> Any:
    (run,) = [record.run for record in records_of(folder) if record.WhichOneof("record_type") == "run"]
    return run


def test_variables_and_arguments_are_those_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`WANDB_*` holds where an argument is not given, an argument goes before it, and the rest is `wandb.init`'s."""
    monkeypatch.setenv("WANDB_PROJECT", "of-the-variable")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_NAME", "a name")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    train(tmp_path / "1", WandbHook(None))
    wandb.teardown()  # it reads the variables once
    monkeypatch.setenv("WANDB_RUN_ID", "run2")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    train(tmp_path / "2", WandbHook("of-the-argument", tags=["c"], name="another", group="g"))
    first, second = run_of(*folders(tmp_path / "1")), run_of(*folders(tmp_path / "elsewhere"))
    assert (first.run_id, first.project, list(first.tags), first.display_name) == (
        "run1",
        "of-the-variable",
        ["a", "b"],
        "a name",
    )
    assert (second.run_id, second.project, list(second.tags)) == ("run2", "of-the-argument", ["c"])
    assert (second.display_name, second.run_group) == ("another", "g")


def test_a_disabled_wandb_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`WANDB_MODE=disabled`: training goes on as ever, nothing is written, and no id gets into the state."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trainer = train(tmp_path, WandbHook("p"))
    assert list(tmp_path.iterdir()) == []
    assert "wandb" not in trainer.state_dict()


def test_the_config_is_the_trainers_or_a_file_or_a_mapping(tmp_path: Path) -> None:
    """None gives the trainer's arguments and what the launch was."""
    file = tmp_path / "config.json"
    file.write_text('{"lr": 0.1, "layers": [1, 2], "data": {"name": null}}')
    train(tmp_path / "none", WandbHook("p"), grad_clip=2.0)
    train(tmp_path / "file", WandbHook("p", config=str(file)))
    train(tmp_path / "mapping", WandbHook("p", config={"path": Path("x"), "lr": torch.tensor(0.5), "t": (1, "a")}))
    config = config_of(*folders(tmp_path / "none"))
    launch = config.pop("launch")
    assert config == {
        "max_steps": 6,
        "max_epochs": None,
        "grad_clip": 2.0,
        "max_non_finite_grad_retries": None,
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
        "workspace": str(tmp_path / "none"),
        "no_sync_accumulate": True,
        "seed": 0,
    }
    assert (launch["world_size"], launch["strategy"], launch["device"]) == (1, "NO", "cpu")
    assert launch["versions"]["torch"] == torch.__version__
    assert config_of(*folders(tmp_path / "file")) == json.loads(file.read_text())
    assert config_of(*folders(tmp_path / "mapping")) == {"path": "x", "lr": 0.5, "t": [1, "a"]}


def test_what_is_logged_around_train_belongs_to_the_run(tmp_path: Path) -> None:
    """Before the first step, in any order of the hooks, and after the last: a final test for example."""

    class First(BaseHook):
        def on_before_train(self, trainer: Any) -> None:
            trainer.log({"val": {"at_start": 1}})

        def on_after_train(self, trainer: Any) -> None:
            trainer.log({"val": {"at_end": 2}})

    hook = WandbHook("p")
    trainer = SmallTrainer(2, workspace=tmp_path, hooks_=lambda self: [First(), hook, LoggingHook(1), First()])
    trainer.train()
    assert hook.run is None
    trainer.log({"test": {"accuracy": torch.tensor(0.5), "by_class": [0.25, 0.75]}})
    rows = [{k: v for k, v in row.items() if not k.startswith("train/")} for row in rows_of(tmp_path)]
    assert rows == [
        {"trainer/step": 0, "val/at_start": 1},
        {"trainer/step": 1},
        {"trainer/step": 2, "val/at_end": 2},
        {"trainer/step": 2, "val/at_end": 2},
        {"trainer/step": 2, "test/accuracy": 0.5, "test/by_class/0": 0.25, "test/by_class/1": 0.75},
    ]


def test_a_dry_run_says_what_it_would_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And logs nothing."""
    trainer = SmallTrainer(1, workspace=tmp_path, hooks_=lambda self: [WandbHook("p")])
    with caplog.at_level(logging.INFO, "trainloop"):
        trainer.train()
        trainer.log({"a": {"b": 1}}, dry_run=True)
        trainer.log_images({"c": torch.zeros(3, 4, 5)}, dry_run=True)
    assert rows_of(tmp_path) == []
    assert any("Would log to W&B at step 1: {'a/b': 1}." in message for message in caplog.messages)
    assert any("Would log images to W&B at step 1: c (5 x 4)." in message for message in caplog.messages)


def test_another_config_is_another_run(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint is gone on with only if it is the same; and without
    checkpoints every start is a new run.
    """

    class Die(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            raise KeyboardInterrupt

    def ids(*hooks: BaseHook, config: Any) -> set[str]:
        hook = WandbHook("p", config=config)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, hook, Die(), *hooks)
        noted = json.loads((tmp_path / "wandb-run.json").read_text())
        (tmp_path / "wandb-run.json").write_text(json.dumps(noted | {"is_on": True, "config": config}))  # as if killed
        return {file.name for file in tmp_path.glob("wandb/*/*.wandb")}

    save = CheckpointingHook(100)
    assert len(ids(save, config={"lr": 1})) == 1
    assert len(ids(save, config={"lr": 1})) == 1
    assert len(ids(save, config={"lr": 2})) == 2
    assert len(ids(config={"lr": 2})) == 3


def test_wrong_arguments_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At construction; also that wandb is missing, where an empty folder of that name is not."""
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "no.json").write_text("{")
    for kwargs, message in [
        ({"project": 1}, "`project` must be a string or None, but is 1 (int)."),
        ({"tags": "a"}, "`tags` must be a list of strings or None, but is 'a' (str)."),
        ({"image_format": "gif"}, "`image_format` must be one of ('png', 'jpg', 'jpeg', 'bmp'), but is 'gif'."),
        ({"config": 3}, "`config` must be a mapping, the path of a JSON file or None, but is 3 (int)."),
        ({"config": tmp_path / "list.json"}, "list.json holds [1] (list)."),
        ({"config": tmp_path / "no.json"}, "no.json cannot: Expecting property name"),
        ({"config": tmp_path / "none.json"}, "none.json cannot: [Errno 2]"),
        ({"nmae": "x"}, "WandbHook hands its other arguments to `wandb.init`, which has no nmae."),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            WandbHook(**({"project": "p"} | kwargs))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(ImportError, match=re.escape("pip install 'trainloop-accelerate[wandb]'")):
        WandbHook("p")
