"""`assert_resume_exact` fails for a trainer that does not resume exactly, says where, and never passes for nothing."""

from __future__ import annotations

import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from trainloop.checkpoint import FileSystem
from trainloop.hook import BaseHook
from trainloop.testing import FILE_OPERATIONS, HOOK_EVENTS, KillAt, assert_resume_exact
from trainloop.testing.comparison import differences

from .workers import inexact
from .workers.resume import sample_ids

KILLS = [KillAt(3, "on_after_step"), KillAt(5, "forward")]


def prove(reason: str = "", kills: Any = KILLS, **kwargs: Any) -> None:
    assert_resume_exact(partial(inexact.make_trainer, reason=reason), kills, **kwargs)


def test_an_exact_trainer_passes() -> None:
    """The trainer of which the others here are made is no reason to fail."""
    prove()


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("hook", r"rank 0 at step 3 of life 2, which began after step 2:\n  logged/0/count is 1 instead of 3"),
        ("hidden", r"rank 0 in the state at the end:\n  model/weight\[0, 1\] is \S+ instead of \S+ \(1 of 3 elem"),
        ("data", r"rank 0 at step 3 of life 2, .*:\n  losses/0 is 0\.\d+ instead of 0\.\d+\n  grad_norm is"),
        ("clock", r"differs on rank 0 at step 1 of life 1, which began after step 0:\n  logged/0/now_seconds is "),
    ],
)  # fmt: skip
def test_what_differs_is_named_with_both_values(reason: str, message: str) -> None:
    """A hook's counter that is not saved, seen in the log or only in the weights at the end; a data set with a
    generator of its own; a clock: the first step or entry is named, and the life it belongs to.
    """
    with pytest.raises(AssertionError, match=message):
        prove(reason)


def test_what_is_recorded_is_compared() -> None:
    """With `record` the difference shows in what it gave of each micro-batch."""
    with pytest.raises(AssertionError, match=r"at step 3 of life 2, .*(?s:.*)recorded/0/2/0 is 0\.\d+ instead of"):
        prove("data", record=partial(sample_ids, index=1))


def test_what_may_differ_is_left_out() -> None:
    """By pattern."""
    prove("clock", ignore=["*_seconds"])


@pytest.mark.parametrize(
    ("reason", "kills", "error", "message"),
    [
        ("no checkpoints", KILLS, ValueError, "must give a trainer with a CheckpointingHook, but the hooks are []"),
        ("no seed", KILLS, ValueError, "must give the trainer a `seed`"),
        ("never loads", KILLS, ValueError, "Nothing was shown: no life of the run went on from a checkpoint"),
        ("", [KillAt(1, "forward")], ValueError, "Nothing was shown: no life of the run went on from a checkpoint"),
        ("one folder", KILLS, ValueError, "life 1 of the run began after step 6 and came to its end"),
        ("", [KillAt(6, "on_after_step", number=2)], ValueError, "step 6 on, rank 0 has met on_after_step 1 times"),
        ("raises", KILLS, RuntimeError, "Rank 0 in life 1 of the run ended with exit code 1. It printed:"),
        ("raises", KILLS, RuntimeError, "ZeroDivisionError"),
        ("", [], ValueError, "`kill_at` must hold at least one `KillAt`"),
        ("", ["step 3"], TypeError, "`kill_at` must hold `KillAt`s, but one is 'step 3' (str)."),
        ("", [KillAt(1, "forward", rank=1)], ValueError, "`rank` must be below `num_processes`, which is 1"),
    ],
)  # fmt: skip
def test_a_proof_of_nothing_is_an_error(reason: str, kills: Any, error: Any, message: str) -> None:
    """A trainer with which nothing can be shown, a kill that never happened, and a run that fails by itself."""
    with pytest.raises(error, match=re.escape(message)):
        prove(reason, kills)


def test_a_life_that_hangs_is_ended() -> None:
    """After `timeout`, with what it printed."""
    with pytest.raises(RuntimeError, match="Rank 0 in life 1 of the run did not end in time"):
        prove("hangs", timeout=3)


def test_launch_arguments_are_those_of_accelerate() -> None:
    """What `accelerate launch` does not know is told in its own words."""
    with pytest.raises(ValueError, match=r"`launch_args` must be options (?s:.*)--no_such_option"):
        prove(launch_args=["--no_such_option"])


def test_a_kill_is_checked_where_it_is_made() -> None:
    """By event and numbers."""
    with pytest.raises(ValueError, match=r"`event` must be one of on_before_train, .*, but is 'on_step'"):
        KillAt(1, "on_step")
    with pytest.raises(ValueError, match="`number` must be at least 1, but is 0"):
        KillAt(1, "disk", number=0)
    assert KillAt(1, "disk", signal=signal.SIGTERM).signal == signal.SIGTERM


def test_every_event_can_be_killed_at() -> None:
    """The names are those of `BaseHook` and of `FileSystem`, and a new one is not forgotten."""
    own = {name for name in vars(BaseHook) if name.startswith("on_")}
    assert set(HOOK_EVENTS) == own - {"on_exception"}
    others = {"free_bytes", "sync_path"}  # which changes nothing, and which is a `sync_file`
    assert set(FILE_OPERATIONS) == {name for name in vars(FileSystem) if not name.startswith("_")} - others


def test_states_are_compared_bit_by_bit(tmp_path: Path) -> None:
    """NaN is equal to itself, -0.0 is not 0.0, 1 is neither 1.0 nor True, and each kind of difference is told."""
    nan = torch.tensor([float("nan"), 0.0])
    state = {"a": [nan, 1, "x"], "b": {"c": torch.tensor(2.0), "d": float("nan")}, "e": torch.zeros(0)}
    same = {"a": [nan.clone(), 1, "x"], "b": {"c": torch.tensor(2.0), "d": float("nan")}, "e": torch.zeros(0)}
    assert list(differences(state, same)) == []
    other = {"a": [-nan, 1.0], "b": {"c": torch.tensor(2.0).double()}, "f": True}
    assert list(differences(state, other)) == [
        "a/0[0] is nan instead of nan (2 of 2 elements differ)",
        "a/1 is 1.0 instead of 1",
        "a/2 is missing; it should be 'x'",
        "b/c is tensor(2., dtype=torch.float64) instead of tensor(2.)",
        "b/d is missing; it should be nan",
        "e is missing; it should be tensor([])",
        "f is True, but should not be there",
    ]
    assert list(differences(state, other, ["a/*", "b/*", "[ef]"])) == []
