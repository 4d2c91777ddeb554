"""When this process has started, by the clock of `time.time`."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.time()
_START_TICKS = 19  # of the fields of /proc/self/stat behind the name of the command


def process_start() -> float:
    """When this process has started, in seconds since 1970. Where the system does not tell it, when trainloop was
    imported.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot  # type: ignore[attr-defined,unused-ignore]
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    return time.time() - age if age >= 0 else _IMPORTED
