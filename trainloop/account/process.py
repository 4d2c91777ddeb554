"""The start time of a process, on the clock of `time.time`."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.time()
_START_TICKS = 19  # index of the field in /proc/PID/stat, after the name of the command


def own_start() -> float:
    """When this process started, in seconds since 1970. If the system doesn't tell: when trainloop was imported."""
    started = process_start(os.getpid())
    return _IMPORTED if started is None else started


def process_start(pid: int) -> float | None:
    """When a process on this host started. None: the system doesn't tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time() - age if age >= 0 else None
