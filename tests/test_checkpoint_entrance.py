"""The docstring of `trainloop.checkpoint` tells the life of a save and of a load as it is in the code."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import trainloop
import trainloop.checkpoint
from trainloop import CheckpointingHook
from trainloop.checkpoint.format.layout import LATEST, MANIFEST, REPLACED, TEMPORARY, TRASH, step_name

from .small import SmallTrainer

PACKAGE = Path(trainloop.__file__).parent
SAVE, LOAD = (trainloop.checkpoint.__doc__ or "").split("The life of one ")[1:]


def steps(story: str) -> list[tuple[str, str]]:
    """The file and the name of each numbered line, in order."""
    lines = re.findall(r"^(\d+)\. (?:every rank|rank 0), `([\w/]+\.py)` `([\w.]+)`[:,.]", story, re.M)
    assert [number for number, _, _ in lines] == re.findall(r"^(\d+)\.", story, re.M)
    return [(file, name) for _, file, name in lines]


def called_during(work: Callable[[], Any], first: tuple[str, str]) -> list[tuple[str, str]]:
    """The file and the name of each function of ours that `work` calls from `first` on, in the order of first calls."""
    calls: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            call = (str(path.relative_to(PACKAGE)), frame.f_code.co_qualname.removesuffix(".__init__"))
            if calls or call == first:
                calls.setdefault(call)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return list(calls)


@pytest.mark.parametrize("story", [SAVE, LOAD], ids=["save", "load"])
def test_a_run_calls_what_the_story_names_in_that_order(story: str, tmp_path: Path) -> None:
    """Each named function is in the named file, and a run of one process calls them in the order of the lines."""

    def trainer(max_steps: int) -> SmallTrainer:
        return SmallTrainer(max_steps, workspace=tmp_path, hooks_=lambda _: [CheckpointingHook(1)])

    if story is LOAD:
        trainer(1).train()
    expected = steps(story)
    calls = called_during(trainer(2).train, first=expected[0])
    assert [call for call in calls if call in expected] == expected
    assert set(re.findall(r"`([\w/]+\.py)` `([\w.]+)`", story)) <= set(calls)


def test_the_story_has_the_names_on_the_disk() -> None:
    """It says when each kind of name comes and goes."""
    for name in (TEMPORARY, REPLACED, TRASH, LATEST, MANIFEST, step_name(5)):
        assert re.search(rf"`{re.escape(name)}[^`]*`", SAVE + LOAD)
