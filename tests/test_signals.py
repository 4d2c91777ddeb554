"""A signal, whenever it comes and to whichever rank: a last commit and the right exit code, on every rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from trainloop.checkpoint import Checkpoint
from trainloop.data.workers import end_workers, start_iterator
from trainloop.ranks.control import REQUESTS, Control
from trainloop.testing import KillAt
from trainloop.testing.lives import live

from .launching import NUM_PROCESSES, REPOSITORY, command, environment
from .small import SmallTrainer
from .workers.resume import make_trainer
from .workers.signals import Stuck

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


def exchanged(control: Control) -> dict[str, int]:
    control.start(())
    control.finish(1)
    return control.agreed


def test_the_first_of_several_signals_decides() -> None:
    """On one rank: neither a higher number in the same window nor another in a later one takes its place."""
    control = Control()
    control.ask("exit_signal", signal.SIGUSR1)
    control.ask("exit_signal", signal.SIGTERM)
    assert exchanged(control)["exit_signal"] == signal.SIGUSR1
    control.ask("exit_signal", signal.SIGTERM)
    assert exchanged(control)["exit_signal"] == signal.SIGUSR1
    assert control.take("exit_signal") == signal.SIGUSR1
    assert exchanged(control)["exit_signal"] == 0


@pytest.mark.parametrize(("count", "raised", "last_step"), [(1, SystemExit, 2), (2, KeyboardInterrupt, 1)])
def test_ctrl_c_in_a_step(
    count: int, raised: type[BaseException], last_step: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one lets the step end, the second one does not. The log says if nothing is saved."""

    def forward(trainer: Any, batch: Any) -> Any:
        for _ in range(count * (trainer.step == 2)):
            os.kill(os.getpid(), signal.SIGINT)
        return trainer.model(batch[0]).pow(2).mean(), {}

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may have been started without it
    try:
        trainer = SmallTrainer(4, forward_=forward)
        with pytest.raises(raised) as ended, caplog.at_level("WARNING", "trainloop"):
            trainer.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.step == last_step
    told = "Ctrl-C: the run ends after step 2. Nothing is saved: the run has no CheckpointingHook."
    assert (told in caplog.text) == (raised is SystemExit)
    if raised is SystemExit:
        assert ended.value.code == 128 + signal.SIGINT  # type: ignore[attr-defined]


class Interrupting(dict):  # type: ignore[type-arg]
    """A signal arrives whenever an entry is looked at."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(REQUESTS, 0))
        self.is_armed = True

    def __getitem__(self, key: str) -> int:
        value: int = super().__getitem__(key)
        if self.is_armed and key == REQUESTS[-1]:
            self.is_armed = False
            os.kill(os.getpid(), signal.SIGUSR1)
        return value


def test_a_signal_in_the_middle_of_the_exchange_is_not_lost() -> None:
    """One that arrives when the requests are being read is told with this exchange or with the next."""
    control = Control()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: control.ask("exit_signal", number))
    try:
        control._asked = Interrupting()
        told = [dict(exchanged(control)), dict(exchanged(control))]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told[1]["exit_signal"] == signal.SIGUSR1


def is_whole(workspace: Path, step: int) -> bool:
    return not Checkpoint.open(workspace / "checkpoints" / f"step_{step:07d}").find_problems()


@pytest.mark.parametrize(
    ("kwargs", "kill", "num_processes", "code", "step"),
    [
        ({}, KillAt(5, "forward", 1, 2, TERM), 2, 143, 5),
        ({}, KillAt(5, "on_after_step", 1, 1, TERM), 2, 143, 6),
        ({"async_save": True, "max_steps": 50}, KillAt(4, "write", 0, 2, TERM), 2, 143, None),
        ({"exit_code": 7}, KillAt(13, "forward", 0, 1, TERM), 2, 7, 13),
        ({"data": "again late", "exit_wait": 0.8, "exit_code": 9}, KillAt(5, "forward", 1, 1, USR1), 2, 9, 5),
        ({"data": "again"}, KillAt(5, "forward", 1, 1, USR1), 2, 138, 5),
    ],
    ids=["in training", "after a step", "during an async save", "in the last step", "again in exit_wait", "again"],
)
def test_all_ranks_save_and_exit_alike(
    tmp_path: Path, kwargs: Any, kill: KillAt, num_processes: int, code: int, step: int | None
) -> None:
    """Sent to one of two ranks: after the same step a whole checkpoint, and the same exit code on both; a second
    signal of another kind changes neither.
    """
    workspace = tmp_path / "run"
    make = partial(make_trainer, exit_signals=["SIGTERM", "SIGUSR1"], **kwargs)
    assert live(make, workspace, kill, num_processes=num_processes) == [code] * num_processes
    saved = max(int(path.name[5:]) for path in (workspace / "checkpoints").glob("step_*"))
    assert is_whole(workspace, saved)
    assert step is None or saved == step
    assert [path.name for path in (workspace / "checkpoints").glob(".tmp*")] == []


def test_a_signal_while_the_run_waits_for_data_is_acted_on(tmp_path: Path) -> None:
    """The batch is still trained on; then the run is saved and exits."""
    workspace = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"ended with exit code 143(?s:.*)SIGTERM was received: saved after step 2"):
        live(partial(make_trainer, data="waited", exit_signals="SIGTERM"), workspace)
    assert is_whole(workspace, 2)


SCRIPT = """
import sys
from pathlib import Path
from tests.workers.resume import make_trainer

workspace = Path(sys.argv[1])
trainer = make_trainer(workspace, max_steps=100000, interval=100000, exit_signals="SIGTERM")
rank = trainer.accelerator.process_index
forward = trainer.forward
def announced(batch):
    (workspace / f"trains.{rank}").touch()
    return forward(batch)
trainer.forward = announced
try:
    trainer.train()
except SystemExit as ex:
    (workspace / f"code.{rank}").write_text(str(ex.code))
    raise
"""


def test_ending_the_launcher_ends_the_run_with_a_commit(tmp_path: Path) -> None:
    """SIGTERM to `accelerate launch`, which hands it to its ranks: a last commit, and 143 on each of them."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        command(script, "ddp2", [str(tmp_path)]),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and len(list(tmp_path.glob("trains.*"))) < 2:
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert [(tmp_path / f"code.{rank}").read_text() for rank in (0, 1)] == ["143", "143"], output[-3000:]
    step = int(re.findall(r"SIGTERM was received: saved after step (\d+) in \S+, exiting with code 143", output)[0])
    assert is_whole(tmp_path, step)


WORKER = REPOSITORY / "tests" / "workers" / "signals.py"


@pytest.mark.parametrize(
    ("method", "form", "number"),
    [("fork", "ddp2", TERM), ("spawn", "single", TERM), ("forkserver", "single", USR1)],
)
def test_a_signal_to_the_whole_group_ends_the_run_with_a_commit(
    tmp_path: Path, method: str, form: str, number: int
) -> None:
    """The launcher, Slurm or a terminal sends it to every process of the job: the workers of the data loaders leave it
    to their rank, which saves and exits with 143. Nothing of the job is left.
    """
    args = [str(tmp_path), method]
    process = subprocess.Popen(
        command(WORKER, form, args) if form == "ddp2" else [sys.executable, str(WORKER), *args],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    num_ranks = NUM_PROCESSES[form]
    while process.poll() is None and len(list(tmp_path.glob("trains.*"))) < num_ranks:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    code = 128 + number
    codes = [(tmp_path / f"code.{rank}").read_text() for rank in range(num_ranks)]
    assert codes == [str(code)] * num_ranks, output[-3000:]
    assert form == "ddp2" or process.returncode == code
    assert len(list(tmp_path.glob("worker.*"))) == 2 * num_ranks
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    assert is_whole(tmp_path, int(saved.name[5:]))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes of the job are left")


def test_a_worker_that_hangs_is_ended_with_its_iterator(tmp_path: Path) -> None:
    """Although it leaves SIGTERM, by which torch ends it, to its rank."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        iterator = start_iterator(DataLoader(Stuck(tmp_path), num_workers=1))
        while not (files := list(tmp_path.glob("worker.*"))):
            time.sleep(0.05)
        end_workers(iterator)
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(files[0].suffix[1:]), 0)
