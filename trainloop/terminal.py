"""Owns the terminal that a person watches: lines scroll, and below them stands one live bar.

    12:00:07 INFO step 50/300 | loss 1.01 | …
                                                       <- the cursor waits on this empty line
    training 57/300 ━━━━━━━────────────────────── 24.1 steps/s | ETA 0:00:10 | loss 1.01

- Everything that this process writes to stdout or stderr removes the bar first. This covers log handlers, warnings,
  `print` and tracebacks. The `write` of the stream itself is replaced, because handlers keep a reference to the stream.
- What bypasses Python (a library in C++, the launcher) starts on the empty line, so it isn't glued to the bar either.
- On other ranks and in forked workers no bar is drawn, but their lines clear what rank 0 has drawn below the cursor.
- Without a terminal (a file, a pipe, a notebook), nothing is drawn and no stream is touched.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, TextIO

_DRAW_SECONDS = 0.1
_MAX_METER = 40  # columns of the bar proper
_MIN_METER = 8
_CLEAR = "\r\x1b[J"  # to the start of the line, and erase what is below
_UP = "\x1b[A\r"


class Bar:
    """Progress of something that takes long. Use it as a context manager, or call `open` and `close`.

    Only the bar that was opened last is visible, and `delay` seconds must have passed since then.

    Args:
        title: What is done, for example "evaluation".
        total: How many units there are. None: unknown.
        unit: Singular, for example "step".
        done: Units that were done before.
        warmup: The first units, which the estimate of the remaining time leaves out.
        delay: Seconds before the bar appears.
        is_drawn: Whether this process draws it; True on one rank only.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        warmup: int = 0,
        delay: float = 0.0,
        is_drawn: bool = True,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.is_drawn = is_drawn
        self.note = ""
        """Shown at the end of the bar."""
        self.visible_from = time.monotonic() + delay
        self._first_timed, self._timed_since = done + warmup, time.monotonic()

    def open(self) -> Bar:
        """Show the bar until `close`."""
        _screen.add(self)
        return self

    def close(self) -> None:
        """Remove the bar. The one that was opened before it is visible again."""
        _screen.remove(self)

    def __enter__(self) -> Bar:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        now = time.monotonic()
        if self.done <= self._first_timed:
            self._timed_since = now
        if now >= _screen.next_draw:
            _screen.draw()

    def seconds_left(self) -> float | None:
        """Estimate of the remaining time; None: it isn't known yet."""
        seconds = self._seconds_per_unit()
        return None if seconds is None or self.total is None else max(0, self.total - self.done) * seconds

    def _seconds_per_unit(self) -> float | None:
        num_timed = self.done - self._first_timed
        return (time.monotonic() - self._timed_since) / num_timed if num_timed > 0 else None

    def line(self, columns: int, meter: str = "━─") -> str:
        """The bar as text that fits into `columns`.

        Args:
            columns: Width of the terminal.
            meter: The characters for what is done and for the rest.
        """
        count = f"{self.title} {self.done}" + (f"/{self.total}" if self.total is not None else "")
        parts = [_rate(seconds, self.unit)] if (seconds := self._seconds_per_unit()) else []
        if (left := self.seconds_left()) is not None:
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        tail = " | ".join([*parts, *([self.note] if self.note else [])])
        room = min(_MAX_METER, columns - 1 - len(count) - len(tail) - 2)
        if self.total and room >= _MIN_METER:
            filled = min(room, room * self.done // self.total)
            count += f" {meter[0] * filled}{meter[1] * (room - filled)}"
        text = f"{count} {tail}".rstrip()
        return text if len(text) < columns else text[: max(0, columns - 2)] + "…"


def _rate(seconds: float, unit: str) -> str:
    units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    return f"{1 / seconds:.3g} {units}/s" if seconds < 1 else f"{seconds:.3g} s/{unit}"


class _Stream:
    """A stream whose `write` keeps the screen in order while bars are open."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._before = stream, stream.write
        self._had_own = "write" in vars(stream)  # of another library that records what is written, as wandb does
        self._is_on = True
        self._write = self.write
        stream.write = self._write  # type: ignore[method-assign]

    def write(self, text: str) -> int:
        if not self._is_on or not text:
            return self._before(text)
        return _screen.write(self._stream, self._before, text)

    def release(self) -> None:
        self._is_on = False
        if vars(self._stream).get("write") is not self._write:
            return  # somebody has replaced it since, and calls this one
        if self._had_own:
            self._stream.write = self._before  # type: ignore[method-assign]
        else:
            del self._stream.write


class _Screen:
    def __init__(self) -> None:
        self.next_draw = float("inf")
        self._bars: list[Bar] = []
        self._streams: list[_Stream] = []
        self._lock = threading.RLock()
        self._fd, self._meter = -1, "━─"
        self._draws = False  # this process does, and not only others on the same terminal
        self._is_drawn = self._is_midline = False

    def add(self, bar: Bar) -> None:
        with self._lock:
            if bar in self._bars or not (self._bars or self._take_terminal()):
                return
            self._bars.append(bar)
            self._draws = any(bar.is_drawn for bar in self._bars)
            self.next_draw = 0.0 if self._draws else float("inf")

    def remove(self, bar: Bar) -> None:
        with self._lock:
            if bar not in self._bars:
                return
            self._erase()
            self._bars.remove(bar)
            if self._bars:
                self.draw()
                return
            for stream in self._streams:
                stream.release()
            self._streams, self.next_draw = [], float("inf")

    def close(self) -> None:
        for bar in [*self._bars]:
            self.remove(bar)

    def show(self, note: str) -> None:
        with self._lock:
            for bar in self._bars:
                bar.note = note
            self.draw()

    def draw(self) -> None:
        """Draw the bar that was opened last, unless somebody has written half a line."""
        with self._lock:
            now = time.monotonic()
            visible = [bar for bar in self._bars if bar.is_drawn and bar.visible_from <= now]
            if not self._draws or self._is_midline or not visible:
                return
            self.next_draw, self._is_drawn = now + _DRAW_SECONDS, True
            columns = os.get_terminal_size(self._fd).columns or 80  # asked anew each time: windows change their size
            self._put(f"{_CLEAR}\n{visible[-1].line(columns, self._meter)}{_UP}")

    def write(self, stream: TextIO, write: Any, text: str) -> int:
        with self._lock:
            if self._draws:
                self._erase()
            elif not self._is_midline:
                text = _CLEAR + text
            count: int = write(text)
            self._is_midline = not text.endswith(("\n", "\r"))
            if self._draws and not self._is_midline:
                stream.flush()
                self.draw()
            return count

    def after_fork(self) -> None:
        """In a worker: the parent goes on to draw, and may have held the lock."""
        self._lock, self._draws, self.next_draw = threading.RLock(), False, float("inf")

    def _take_terminal(self) -> bool:
        """Watch the streams that are a terminal; returns whether stderr is one."""
        if os.environ.get("TERM") == "dumb" or not _is_terminal(sys.stderr):
            return False
        self._fd, self._is_midline = sys.stderr.fileno(), False
        try:
            "━─".encode(sys.stderr.encoding)
        except UnicodeEncodeError:
            self._meter = "#-"
        streams = [sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]
        for stream in {id(stream): stream for stream in streams if stream and _is_terminal(stream)}.values():
            with suppress(AttributeError, TypeError):  # it doesn't let its `write` be replaced
                self._streams.append(_Stream(stream))
        return True

    def _erase(self) -> None:
        if self._is_drawn:
            self._is_drawn = False
            self._put(_CLEAR)

    def _put(self, text: str) -> None:
        """Past the streams, whose recorders would keep every frame."""
        with suppress(OSError):  # the terminal was closed; the run goes on
            os.write(self._fd, text.encode(sys.stderr.encoding or "utf-8", errors="replace"))


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty()) and stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):  # none at all, or closed
        return False


_screen = _Screen()
close = _screen.close
"""Remove all bars, before a process ends without cleaning up."""
show = _screen.show
"""Show a note at the end of the bars, at once. A signal handler may call it."""
atexit.register(close)
os.register_at_fork(after_in_child=_screen.after_fork)
