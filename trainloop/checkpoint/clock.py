"""The time of commits, which never goes back."""

from __future__ import annotations

import time


class Clock:
    """Seconds since 1970. Where the system's clock goes back, in this run or between two, time goes on from where it
    was: policies count with the time between commits, and the newest of several folders is found by it.
    """

    def __init__(self) -> None:
        self._last, self._read_at = 0.0, time.monotonic()

    def go_to(self, seconds: float) -> None:
        """Never be before `seconds`, at which something was committed."""
        self._last = max(self.now(), seconds)

    def now(self) -> float:
        """The time."""
        read_at = time.monotonic()
        self._last = max(time.time(), self._last + read_at - self._read_at)
        self._read_at = read_at
        return self._last
