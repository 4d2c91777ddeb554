"""The time of commits, which never goes backwards."""

from __future__ import annotations

import time


class Clock:
    """Seconds since 1970. If the system's clock is set back, within a run or between two, this clock continues from its
    last time. Retention policies use the time between commits, and the newest checkpoint of several folders is found
    by it.
    """

    def __init__(self) -> None:
        self._last, self._read_at = 0.0, time.monotonic()

    def go_to(self, seconds: float) -> None:
        """Don't go below `seconds`, the time of an earlier commit."""
        self._last = max(self.now(), seconds)

    def now(self) -> float:
        """The current time."""
        read_at = time.monotonic()
        self._last = max(time.time(), self._last + read_at - self._read_at)
        self._read_at = read_at
        return self._last
