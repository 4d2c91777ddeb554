"""When a run must be over, and whether its last save must begin."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from ..account.process import own_start
from ..errors import describe

_SCONTROL_SECONDS = 60.0
_FADING = 0.98  # decay of the longest time between two checks, per check: the first step is slow, but not typical


def parse_deadline(given: Any) -> timedelta | datetime | str | None:
    """Check the argument `deadline`.

    Raises:
        TypeError: It has the wrong type.
        ValueError: It is not positive, or it is "slurm" and this process is not part of a Slurm job.
    """
    if isinstance(given, timedelta) and given <= timedelta(0):
        raise ValueError(f"`deadline` must be after the start of the process, but is {given!r}.")
    if given is not None and given != "slurm" and not isinstance(given, timedelta | datetime):
        raise TypeError(f'`deadline` must be a timedelta, a datetime, "slurm" or None, but is {describe(given)}.')
    if given == "slurm" and not os.environ.get("SLURM_JOB_ID"):
        raise ValueError(
            '`deadline` is "slurm", but this process is not part of a Slurm job: `SLURM_JOB_ID` is not set. Outside of'
            " Slurm, give a timedelta, a datetime or None."
        )
    return given  # type: ignore[no-any-return]


def end_time(deadline: timedelta | datetime | str) -> float:
    """The time when the run must be over, in seconds since 1970. Call on one rank, because it may ask Slurm.

    Raises:
        ValueError: Slurm doesn't tell the end of the job.
    """
    if isinstance(deadline, timedelta):
        return own_start() + deadline.total_seconds()
    if isinstance(deadline, datetime):
        return deadline.timestamp()  # without a time zone it is local time
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(told) if told.isdigit() else _ask_slurm(os.environ.get("SLURM_JOB_ID", ""))


def _ask_slurm(job: str) -> float:
    command = ["scontrol", "show", "job", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS)
        output = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as ex:
        output = str(ex)
    found = re.search(r"\bEndTime=(\d\S+)", output)
    if found is None:
        raise ValueError(
            '`deadline` is "slurm", but Slurm does not tell when the job ends: `SLURM_JOB_END_TIME` is not set, and'
            f" `{' '.join(command)}` gives no EndTime. Give a timedelta. It says: {output.strip()[:200]}"
        )
    return datetime.fromisoformat(found[1]).timestamp()  # in this host's time zone


class Deadline:
    """The deadline of a run. Rank 0 checks it about once a step; the other ranks learn of it by the control message.

    Args:
        end: When the run must be over, in seconds since 1970.
        save_seconds: Returns how long the last save will take, from its start until it is durable.
    """

    def __init__(self, end: float, save_seconds: Callable[[], float]) -> None:
        self.end = end
        self._end = time.monotonic() + end - time.time()  # monotonic, because the system's clock may be changed
        self._save_seconds = save_seconds
        self._looked_at: float | None = None
        self._longest = 0.0

    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def is_near(self) -> bool:
        """Whether the last save must begin after the current step."""
        now = time.monotonic()
        if self._looked_at is not None:
            self._longest = max(now - self._looked_at, self._longest * _FADING)
        self._looked_at = now
        # One interval until the next check, and one more until the end of that step.
        return now + 2 * self._longest + self._save_seconds() >= self._end

    def skip(self) -> None:
        """Don't count the time since the last check: it was a save."""
        self._looked_at = None
