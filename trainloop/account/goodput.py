"""Goodput: sorts every second of all lives of a run by how it was spent."""

from __future__ import annotations

from collections.abc import Sequence

from .lives import Life

DEAD = "dead"
CATEGORIES = ("training", "done again", "saving", "evaluating", "waiting for data", "starting", DEAD)
"""How seconds are spent. "saving" is the time that saves block. "starting" is from the start of the process to the
first step. "dead" is between two lives."""


def goodput(lives: Sequence[Life]) -> dict[str, float]:
    """Seconds of a run by category. Their sum is the time from its first start to its last end."""
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    highest = 0
    last: Life | None = None
    for life in lives:
        if last is not None:
            seconds[DEAD] += max(0.0, life.started - last.ended)
        for category, value in _of_life(life, highest).items():
            seconds[category] += value
        highest, last = max(highest, life.step), life
    return seconds


def _of_life(life: Life, highest: int) -> dict[str, float]:
    """Seconds of a life by category. The earlier lives have reached step `highest`."""
    if life.ready is None:
        return {"starting": life.ended - life.started}
    loop = life.ended - life.ready
    spent = _spent(life, life.ended)
    whole = sum(spent.values())
    if whole > loop:  # possible, because seconds and times come from different clocks
        spent = {category: value * loop / whole for category, value in spent.items()}
    rest = max(0.0, loop - sum(spent.values()))
    again = min(rest, _seconds_again(life, highest, rest))
    return {"starting": life.ready - life.started, "training": rest - again, "done again": again, **spent}


def _spent(life: Life, until: float) -> dict[str, float]:
    spent = dict.fromkeys(("saving", "evaluating", "waiting for data"), 0.0)
    for event in life.events:
        if event["time"] <= until:
            if event["event"] == "save":
                spent["saving"] += event.get("seconds", 0.0)
            elif event["event"] == "evaluation":
                spent["evaluating"] += event.get("seconds", 0.0)
            spent["waiting for data"] += event.get("data_seconds", 0.0)
    return spent


def _seconds_again(life: Life, highest: int, rest: float) -> float:
    assert life.ready is not None
    if highest <= life.start_step:
        return 0.0
    reached = again_until(life)
    if reached is not None:
        return max(0.0, reached - life.ready - sum(_spent(life, reached).values()))
    if life.step <= highest:
        return rest
    return rest * (highest - life.start_step) / (life.step - life.start_step)


def again_until(life: Life) -> float | None:
    """The time when a life had repeated all steps of the earlier lives. None: there were none, or it didn't finish."""
    return next((event["time"] for event in life.events if event["event"] == "again"), None)
