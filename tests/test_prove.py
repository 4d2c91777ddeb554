"""`trainloop prove`: what it shows of trainers that are exact, and what it says of those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainloop.__main__ import main

from .launching import FSDP2, REPOSITORY

WORKER = "tests.workers.proving"


def proved(capsys: pytest.CaptureFixture[str], name: str, *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["prove", name, *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_digits_are_proved(capsys: pytest.CaptureFixture[str]) -> None:
    """A class of trainer without checkpoints of its own is given some; the page has the verdict and what it costs."""
    path = REPOSITORY / "examples" / "digits.py"
    code, out, err = proved(capsys, f"{path}:DigitsTrainer", "--processes", 1, "--steps", 6)
    assert (code, out.splitlines()[0]) == (0, f"{path}:DigitsTrainer: all was shown")
    assert "yes  1 process: killed twice and resumed" in out
    for label in ("a save", "  blocks the run for", "  is durable after", "peak memory", "a step", "samples a second"):
        assert f"\n{label}" in out
    assert err.count("1 process: the run") == 4


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(capsys: pytest.CaptureFixture[str], tmp_path: Path, strategy: str) -> None:
    """The proof at two processes says that the training is the same; JSON has the same as the page."""
    options = ["--strategy", strategy, "--json", "--workspace", tmp_path]
    launch = ["--", *FSDP2[3:7]] if strategy == "fsdp2" else []
    code, out, _ = proved(capsys, f"{WORKER}:exact", *options, *launch)
    told = json.loads(out)
    assert (code, told["held"]) == (0, True)
    two = f"2 processes ({strategy.upper()})"
    assert [check["name"] for check in told["checks"]] == [
        "1 process: killed twice and resumed",
        f"{two}: killed twice and resumed",
        f"1 and {two}: the same training",
    ]
    assert told["checks"][2]["text"].startswith("the same learning rates; losses differ by at most")
    numbers = told["numbers"][two]
    assert all(
        numbers[key] > 0 for key in ("save_bytes", "save_whole_seconds", "peak_memory_bytes", "samples_a_second")
    )
    assert (tmp_path / "on_2" / "killed" / "events.jsonl").exists()
    assert proved(capsys, f"{WORKER}:exact", "--workspace", tmp_path)[0] == 2  # another proof lies there


@pytest.mark.parametrize(
    ("name", "step", "cause"),
    [
        ("shrinking", 6, "the update depends on something that a checkpoint does not have"),
        ("other_samples", 5, "The samples themselves differ"),
        ("unseeded", 1, "Two runs that nobody disturbed differ as well, first in step 1"),
    ],
)
def test_an_inexact_trainer_is_told_why(capsys: pytest.CaptureFixture[str], name: str, step: int, cause: str) -> None:
    """The verdict names the first step that differs and what it points to."""
    code, out, _ = proved(capsys, f"{WORKER}:{name}", "--processes", 1)
    assert code == 1
    assert out.startswith(f"{WORKER}:{name}: NOT shown: 1 process: killed twice and resumed")
    assert f"Step {step} on rank 0" in out
    assert cause in out


def test_ranks_that_train_differently_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that depends on the rank is seen in the first step."""
    code, out, _ = proved(capsys, f"{WORKER}:by_rank", "--steps", 6)
    assert code == 1
    assert "NO   1 and 2 processes (DDP): the same training\n     step 1: the loss is " in out


@pytest.mark.slow
def test_dropout_is_not_taken_for_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    """Random numbers differ from rank to rank, so only the learning rates are compared."""
    code, out, _ = proved(capsys, f"{WORKER}:dropout", "--steps", 6)
    assert code == 0
    assert "losses and gradients were not compared, because `forward` draws random numbers" in out


def test_what_cannot_be_proved_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A trainer that fails by itself is shown with its output; a wrong name is an error of the command line."""
    code, out, _ = proved(capsys, f"{WORKER}:fails", "--processes", 1)
    assert (code, "ValueError: broken on purpose" in out) == (1, True)
    for name, message in (
        ("nothing", "must be named as module:function"),
        (f"{WORKER}:nothing", "cannot be imported"),
        ("nowhere.py:make", "nowhere.py is not there"),
        (f"{WORKER}:no_arguments", "must take the workspace"),
        (f"{WORKER}:no_trainer", "must return a trainer, but returned str"),
    ):
        code, _, err = proved(capsys, name, "--processes", 1)
        assert (code, message in err) == (2, True), err
    assert proved(capsys, f"{WORKER}:exact", "--steps", 5)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_language_model_is_proved(capsys: pytest.CaptureFixture[str], strategy: str) -> None:
    """With accumulation, token weights, averages and evaluations."""
    path = REPOSITORY / "examples" / "language_model.py"
    code, out, _ = proved(capsys, f"{path}:make_trainer", "--strategy", strategy)
    assert code == 0, out
