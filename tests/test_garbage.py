"""Python's garbage collection: in step on all ranks, and as it was when the run has ended."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainloop import BaseHook

from .launching import REPOSITORY, launch
from .small import SmallTrainer

FEW = 1000
"""More than Python 3.12 freezes when it starts."""
WORKER = REPOSITORY / "tests" / "workers" / "garbage.py"


def test_ranks_collect_after_the_same_steps(tmp_path: Path) -> None:
    """With ranks that make different amounts of garbage, each collection is after a step that `gc_interval` divides, on
    both ranks. The settings are put back, also after an exception, and `None` leaves everything to Python.
    """
    launch(WORKER, "ddp2", str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for results in (first, second):
        for name in ("in step", "failed"):  # when the run has ended, Python collects what is left
            assert results[name]["steps"][:2] == [5, 10]
            assert len(results[name]["steps"]) <= 3
            assert results[name]["after"] == [True, False]
        assert results["off"] == {"steps": [5, 10], "after": [False, False]}
        assert results["python"]["after"] == [True, False]
    assert first["python"]["steps"] != second["python"]["steps"]


class Frozen(BaseHook):
    """What Python's settings are within the run."""

    def on_after_step(self, trainer: Any) -> None:
        self.settings = gc.isenabled(), gc.get_freeze_count() > FEW


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("gc_interval", "freezes"), [(1000, True), (None, False)])
def test_one_process_freezes_what_was_built_and_collects_as_ever(gc_interval: int | None, freezes: bool) -> None:
    """A collection doesn't look at what was there before the first step; when to collect is up to Python."""
    hook = Frozen()
    SmallTrainer(2, gc_interval=gc_interval, hooks_=lambda self: [hook]).train()
    assert hook.settings == (True, freezes)
    assert gc.isenabled()
    assert gc.get_freeze_count() < FEW


def test_what_a_script_has_frozen_stays_frozen(thawed: None) -> None:
    """`gc.unfreeze` thaws everything, so a run leaves alone what was frozen before it."""
    gc.freeze()
    count = gc.get_freeze_count()
    SmallTrainer(1).train()
    assert gc.get_freeze_count() >= count - 100  # some of it has gone of itself


@pytest.mark.parametrize("gc_interval", [0, -1, 1.5])
def test_an_interval_that_makes_no_sense_is_an_error(gc_interval: Any) -> None:
    """At construction."""
    with pytest.raises((TypeError, ValueError), match="`gc_interval` must be"):
        SmallTrainer(1, gc_interval=gc_interval)
