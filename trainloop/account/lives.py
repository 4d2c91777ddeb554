"""The lives of a run, from its events file: when each began, how far it got, and why it ended.

```
from trainloop.account import read_lives

for life in read_lives("runs/digits"):
    print(life.number, life.start_step, life.step, life.reason, life.detail)
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .events import read_events

FAILURES = ("error", "killed")
"""Reasons of lives that did not end as intended."""
STEPS_DONE = ("progress", "evaluation", "discarded", "save", "again", "end")
"""Events whose step is completed."""


@dataclass
class Life:
    """One process life of a run: one call of `train`, or one attempt of the launcher."""

    number: int
    """Number of the life, from 1."""
    started: float
    """When the process started, in seconds since 1970, but not before the end of the last life."""
    begun: float
    """When the run was built."""
    hosts: Mapping[str, int]
    """Number of processes by host."""
    num_processes: int
    """Number of processes on all hosts."""
    version: str
    """Version of trainloop."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries."""
    pid: int = 0
    """Process id of rank 0."""
    host: str = ""
    """Host of rank 0."""
    ready: float | None = None
    """When the run was restored and its loop began. None: it didn't get so far."""
    start_step: int = 0
    """The step that it resumed from."""
    step: int = 0
    """The last step that is known to be done."""
    max_steps: int = 0
    """Number of steps that the run should take. 0: unknown."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings by flat name, as in checkpoints."""
    ended: float = 0.0
    """When it ended. Without an "end" event, the time of its last event or record."""
    reason: str = "killed"
    """"complete", "stopped", "signal", "deadline", "error", or "killed": it has recorded no end. A run that is still
    going has the reason "killed" too."""
    detail: str = ""
    """Name of the signal, first line of the error, or the name of whatever stopped it."""
    cause: str = ""
    """The first failure of a rank that had not just lost contact with another one."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """The "failed" events of all ranks that wrote one."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """All events of the life."""

    @property
    def failed_step(self) -> int:
        """The step that was running when the life failed."""
        steps = [int(failure["step"]) for failure in self.failures if "step" in failure]
        return max(steps, default=self.step + 1)


def read_lives(workspace: Path | str) -> list[Life]:
    """All lives in a workspace, the oldest first. Empty: there is no events file.

    Args:
        workspace: The trainer's workspace, or the path of an events file.
    """
    lives: dict[int, Life] = {}
    for event in read_events(Path(workspace)):
        number = event.get("life")
        if not isinstance(number, int):
            continue
        if event["event"] == "begin":
            lives[number] = _begin(event, lives.get(number - 1))
        elif number in lives:
            _take(lives[number], event)
    return list(lives.values())


def _begin(event: dict[str, Any], last: Life | None) -> Life:
    before = event.get("before") or {}
    if last is not None and last.reason == "killed" and before.get("time", 0.0) >= last.begun:  # the same life's record
        last.ended = max(last.ended, min(before["time"], event["time"]))
        last.step = max(last.step, before.get("step", 0))
    started = min(event.get("started", event["time"]), event["time"])
    return Life(
        number=event["life"],
        started=max(started, last.ended) if last is not None else started,
        begun=event["time"],
        ended=event["time"],
        hosts=event.get("hosts", {}),
        num_processes=event.get("processes", 1),
        version=event.get("version", ""),
        versions=event.get("versions", {}),
        pid=event.get("pid", 0),
        host=event.get("host", ""),
        events=[event],
    )


def _take(life: Life, event: dict[str, Any]) -> None:
    life.events.append(event)
    life.ended = max(life.ended, event["time"])
    kind = event["event"]
    if kind == "start":
        life.ready, life.start_step, life.step = event["time"], event["step"], event["step"]
        life.settings, life.max_steps = event.get("settings", {}), event.get("max_steps") or 0
    elif kind == "failed":
        life.failures.append(event)
        if not event.get("lost_contact") and not life.cause:
            life.cause = failure_text(event)
            life.reason, life.detail = "error", life.cause
    elif kind in STEPS_DONE:
        life.step = max(life.step, int(event.get("step") or 0))
        if kind == "end" and not (life.cause and event.get("reason") == "error"):
            life.reason, life.detail = str(event.get("reason", "")), str(event.get("detail", ""))


def failure_text(event: Mapping[str, Any]) -> str:
    """A "failed" event as one line."""
    return f"{event.get('error', 'error')}: {event.get('detail', '')} (rank {event.get('rank', 0)})"


def split_runs(lives: Sequence[Life]) -> list[list[Life]]:
    """The lives of each run in a workspace. A new run begins with a life that starts at step 0 although there were
    checkpoints.

    Args:
        lives: From `read_lives`.
    """
    runs: list[list[Life]] = []
    has_saved = False
    for life in lives:
        if not runs or (has_saved and life.start_step == 0):
            runs.append([])
            has_saved = False
        runs[-1].append(life)
        has_saved = has_saved or any(event["event"] in ("save", "durable") for event in life.events)
    return runs


def failures_at_same_step(lives: Sequence[Life]) -> tuple[int, int]:
    """The step at which the last life failed, and how many consecutive lives, up to the last one, have failed there.

    Args:
        lives: From `read_lives`, without a life that is still running.

    Returns:
        Step and number of lives. (0, 0): the last life did not fail.
    """
    step = number = 0
    for life in reversed(lives):
        if life.reason not in FAILURES or (number and life.failed_step != step):
            break
        step, number = life.failed_step, number + 1
    return step, number


def failure_times(lives: Sequence[Life]) -> list[float]:
    """The times at which lives have failed, for an estimate of the time between two failures.

    Args:
        lives: From `read_lives`.
    """
    return [life.ended for life in lives if life.reason in FAILURES]
