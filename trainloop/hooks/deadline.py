"""When a run has to be over, and whether it is time for its last save."""

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
_FADING = 0.98  # of the longest time between two looks, a look: the first step is slow, and not typical


def parse_deadline(given: Any) -> timedelta | datetime | str | None:
    """The argument `deadline`.

    Raises:
        TypeError: It is of another kind.
        ValueError: It is "slurm", and this is no job of Slurm's.
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
    """When the run has to be over, in seconds since 1970. Call on one rank: it may ask Slurm.

    Raises:
        ValueError: Slurm does not tell.
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
    return datetime.fromisoformat(found[1]).timestamp()  # of this host's time zone


class Deadline:
    """Looked at about once a step, on rank 0; the other ranks learn of it with the control message.

    Args:
        end: When the run has to be over, in seconds since 1970.
        save_seconds: How long the last save will take, from its start until it is durable.
    """

    def __init__(self, end: float, save_seconds: Callable[[], float]) -> None:
        self.end = end
        self._end = time.monotonic() + end - time.time()  # the system's clock may be set meanwhile
        self._save_seconds = save_seconds
        self._looked_at: float | None = None
        self._longest = 0.0

    def seconds_left(self) -> float:
        """Until the deadline."""
        return self._end - time.monotonic()

    def is_near(self) -> bool:
        """Whether the last save must begin after the step that is under way."""
        now = time.monotonic()
        if self._looked_at is not None:
            self._longest = max(now - self._looked_at, self._longest * _FADING)
        self._looked_at = now
        # The next look may come so much later, and the end of that step again.
        return now + 2 * self._longest + self._save_seconds() >= self._end

    def skip(self) -> None:
        """What has happened since the last look does not count: it was a save."""
        self._looked_at = None
