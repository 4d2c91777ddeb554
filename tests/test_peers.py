"""A rank that dies, fails or hangs ends the others, with an error that says which, where and when."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate import Accelerator

from trainloop import BaseHook, CheckpointingHook
from trainloop.ranks import collectives
from trainloop.ranks.lost_contact import is_lost_contact

from .launching import REPOSITORY, environment, free_port
from .small import SmallTrainer
from .workers.peers import SCENARIOS, SHORT_TIMEOUT, TIMEOUT

WORKER = REPOSITORY / "tests" / "workers" / "peers.py"
DEATHS = [name for name, (_, fate, *_) in SCENARIOS.items() if fate == "dies"]


def run(out: Path, num_ranks: int, strategy: str, *names: str) -> Any:
    """The number of ranks, and by scenario: what happened to which rank, and what the others said."""
    command = [sys.executable, str(WORKER), str(out), str(num_ranks), strategy, *names]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return num_ranks, json.loads((out / f"{strategy}.json").read_text())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every scenario with three ranks under DDP."""
    return run(tmp_path_factory.mktemp("peers"), 3, "ddp")


@pytest.mark.parametrize("name", DEATHS)
def test_a_dead_rank_is_named_at_once_by_all_others(told: Any, name: str) -> None:
    """SIGKILL in any phase, with nobody but the ranks themselves to notice: every other rank ends with `TrainingError`
    well within the timeout, which names rank, process, step and phase, and keeps torch's error as its cause.
    """
    check_death(name, *told)


def test_it_is_named_under_fsdp2_too(tmp_path: Path) -> None:
    """Two ranks, one of which dies while the other waits for its shards, a gradient, a message, a file, a sum."""
    names = [name for name in DEATHS if name not in ("build", "first rank")]
    num_ranks, results = run(tmp_path, 2, "fsdp2", *names)
    assert list(results) == names
    for name in names:
        check_death(name, num_ranks, results)


def check_death(name: str, num_ranks: int, results: Any) -> None:
    result, step = results[name], SCENARIOS[name][3]
    victim = result["victim"]
    others = [rank for rank in range(num_ranks) if rank != victim]
    assert result["ended"] == others
    assert [int(rank) for rank in result["said"]] == others
    for said in result["said"].values():
        # A thread's save dies beside the next step, which is where the others notice.
        where = rf"Step {step}" if name != "vote of a thread" else rf"Step ({step}|{step + 1})"
        expected = (
            rf"TrainingError: {where}: lost contact with other ranks after \d+\.\d s of [a-z' ]+\."
            rf" Rank {victim} \(process {result['pid']} on \S+\) is gone\. Look at the output there"
        )
        assert re.match(expected, said["error"]), said["error"]
        assert ("to continue from the last checkpoint" in said["error"]) == (name != "build")
        assert said["cause"].startswith(("RuntimeError(", "LostContactError("))
        assert said["seconds"] < TIMEOUT / 2  # at once, but for a busy machine
    phase = {"evaluation": "an evaluation", "vote": "saving a checkpoint", "build": "building the run"}.get(name)
    assert all(phase in said["error"] for said in result["said"].values() if phase is not None)


def test_a_rank_that_fails_tells_the_others_why(told: Any) -> None:
    """An exception on one rank: it leaves that rank unchanged, and is named in the error of the others."""
    num_ranks, results = told
    said, victim = dict(results["error"]["said"]), results["error"]["victim"]
    assert said.pop(str(victim))["error"] == "ValueError: sample 17 is broken"
    assert len(said) == num_ranks - 1
    for other in said.values():
        assert f"Rank {victim} (process " in other["error"]
        assert "ended with ValueError: sample 17 is broken. Look at the output there." in other["error"]


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(told: Any) -> None:
    """Sleeping, it still says where it is; stopped by a signal, it doesn't answer. Either way `timeout` holds."""
    check_hang("hang", *told)
    check_hang("frozen", *told)


@pytest.mark.parametrize("num_ranks", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_many_ranks_name_the_one_that_died_or_hangs(tmp_path: Path, num_ranks: int) -> None:
    """Killed before its message to the others and after it, and asleep: all others name this one rank, and no other."""
    names = ["control", "message", "hang"]
    _, results = run(tmp_path, num_ranks, "ddp", *names)
    check_death("control", num_ranks, results)
    check_death("message", num_ranks, results)
    check_hang("hang", num_ranks, results)
    for name in names:
        assert [re.findall(r"ank (\d+) \(", said["error"]) for said in results[name]["said"].values()] == [
            [str(num_ranks - 1)]
        ] * (num_ranks - 1)


def check_hang(name: str, num_ranks: int, results: Any) -> None:
    result = results[name]
    assert len(result["ended"]) == num_ranks - 1
    for said in result["said"].values():
        assert said["seconds"] > SHORT_TIMEOUT - 1
        place = f"ank {result['victim']} (process {result['pid']} on "
        assert place in said["error"]
        if name == "hang":
            assert re.search(
                r"has been in step 2, forward and backward, for \d+\.\d s, and the others wait\.", said["error"]
            )
            assert "It hangs, or needs more time than `timeout` (8 s) gives." in said["error"]
        else:
            assert "does not answer." in said["error"]


@pytest.mark.parametrize(
    ("exception", "is_lost"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.1]:1"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/x.cc:78] Timed out waiting 1800000ms for recv operation"), True),
        (RuntimeError("Connection closed by peer"), False),  # of the script itself
        (RuntimeError("Timed out waiting for the database"), False),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("Connection reset by peer"), False),  # of a data set's server
        (None, False),
    ],
)
def test_only_a_failed_collective_is_taken_for_lost_contact(exception: Exception | None, is_lost: bool) -> None:
    """By torch's own types and gloo's texts; what a script's network says is not mistaken for it."""
    assert is_lost_contact(exception) == is_lost


def limits(*groups: Any) -> list[timedelta]:
    return [group._get_backend(group._device_types[0]).options._timeout for group in groups]


def test_the_timeout_reaches_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given in seconds or as a timedelta; also with an `Accelerator` of the script; without it Accelerate's."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo")
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    try:
        accelerator = Accelerator(cpu=True)
        assert collectives.timeout() == timedelta(minutes=30)
        SmallTrainer(accelerator=accelerator, timeout=600)
        assert collectives.timeout() == timedelta(minutes=10)
        assert limits(collectives.host_group()) == [timedelta(minutes=10)]
        SmallTrainer(accelerator=accelerator, timeout=timedelta(minutes=3))
        assert limits(dist.group.WORLD, collectives.host_group()) == [timedelta(minutes=3)] * 2
    finally:
        dist.destroy_process_group()
        collectives._host_groups.clear()  # a process that another test forks would wait for its threads, in vain


def test_a_hook_that_fails_at_the_end_hides_neither_the_error_nor_the_other_hooks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each hook hears of the exception; what one of them raises then is logged."""
    heard = []

    class Fails(BaseHook):
        def on_exception(self, trainer: Any, exception: BaseException) -> None:
            heard.append(exception)
            raise OSError("disk full")

    def forward(self: Any, batch: Any) -> Any:
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first") as info:
        SmallTrainer(hooks_=lambda self: [Fails(), Fails()], forward_=forward).train()
    assert heard == [info.value] * 2
    assert "Fails.on_exception failed: disk full" in caplog.text


def test_the_report_names_what_runs(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """One process: two lines. More are in tests/test_integrations.py, by the launch files."""
    with caplog.at_level("INFO", "trainloop"):
        SmallTrainer(
            1, hooks_=lambda self: [CheckpointingHook(1)], workspace=tmp_path, gradient_accumulation_steps=2
        ).train()
    report = caplog.messages[0].split(" on ", 1)
    assert report[0] == "[RANK 0] 1 process"
    host_and_device, _, rest = report[1].partition(";")
    assert host_and_device.endswith(": cpu")
    assert rest == (
        " 4 parameters (0.0 KiB), weights fp32, compute fp32\n  global batch 4 = 2 a process x 2 accumulated x 1"
        f" process; seed 0, checkpoints in {tmp_path / 'checkpoints'}"
    )


@pytest.mark.parametrize(("victim", "place"), [(0, "accelerator"), (2, "constructor"), (1, "script")])
def test_a_rank_that_fails_before_the_run_begins_is_named_in_seconds(victim: int, place: str) -> None:
    """Without a launcher that would end the others: they are told which rank ended, and with what, long before the
    timeout of two minutes.
    """
    worker, port = REPOSITORY / "tests" / "workers" / "constructor.py", str(free_port())
    variables = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(victim), place],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert all(rank.returncode == 1 for rank in ranks), outputs
    assert "ValueError: no such data set" in outputs[victim]
    told = rf"TrainingError: The run cannot begin: rank {victim} \(process {ranks[victim].pid} on \S+\) ended with"
    for rank in {0, 1, 2} - {victim}:
        assert re.search(told + " ValueError: no such data set. Look at the output there.", outputs[rank]), outputs[
            rank
        ]
