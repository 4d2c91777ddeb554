"""When a process has started, by the clock of `time.time`."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.time()
_START_TICKS = 19  # of the fields of /proc/PID/stat behind the name of the command


def own_start() -> float:
    """When this process has started, in seconds since 1970. Where the system does not tell it, when trainloop was
    imported.
    """
    started = process_start(os.getpid())
    return _IMPORTED if started is None else started


def process_start(pid: int) -> float | None:
    """When a process of this host has started; None: the system does not tell it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time() - age if age >= 0 else None
