"""Runs a program in a pseudo-terminal and shows what a person sees there: the screen, and what has scrolled off it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyte

from .launching import kill_tree

BAR = re.compile(r"(training|evaluation|reading again) \d+(/\d+)?( [━─]+)?( .*)?")


_WRAPPED = -1  # a column that no screen has: marks rows that a line goes on from


class _Screen(pyte.HistoryScreen):
    """Remembers which rows were wrapped."""

    _is_drawing = False

    def draw(self, data: str) -> None:
        self._is_drawing = True
        super().draw(data)
        self._is_drawing = False

    def linefeed(self) -> None:
        if self._is_drawing:
            self.buffer[self.cursor.y][_WRAPPED] = self.default_char
        super().linefeed()


def _begin_session() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in what it starts in the background


class Terminal:
    """A terminal with a program in it, which is the leader of its session, as under a shell.

    Args:
        command: The program and its arguments.
        columns: Width.
        rows: Height. Small, so that the lines scroll.
        env: Its environment.
    """

    def __init__(self, command: Sequence[str], columns: int, rows: int, env: Mapping[str, str]) -> None:
        self._screen = _Screen(columns, rows, history=2000)
        self._stream = pyte.ByteStream(self._screen)
        self._main, terminal = pty.openpty()
        self.resize(columns, rows)
        self.output = b""
        self.process = subprocess.Popen(
            command,
            env={**env, "TERM": "xterm-256color"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=_begin_session,
        )
        os.close(terminal)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            kill_tree(self.process.pid)
            self.process.wait()
        os.close(self._main)

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size."""
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen.resize(rows, columns)

    def type(self, keys: str) -> None:
        """Press keys; the character 3 is Ctrl-C."""
        os.write(self._main, keys.encode())

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Show what the program writes, until `condition` holds and all is read that was written before."""
        end = time.monotonic() + seconds
        while True:
            held = condition()
            while self._read(0.0):
                pass
            if held:
                return
            assert time.monotonic() < end, "the program hangs; it shows:\n" + "\n".join(self.rows())
            self._read(0.05)

    def wait(self) -> int:
        """Wait until the program has ended. Returns its exit code."""
        self.wait_for(lambda: self.process.poll() is not None)
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._main], [], [], seconds)
        try:
            chunk = os.read(self._main, 65536) if ready else b""
        except OSError:  # the other end is closed
            chunk = b""
        self.output += chunk
        self._stream.feed(chunk)
        return bool(chunk)

    def _wrapped_rows(self) -> list[tuple[str, bool]]:
        screen = self._screen
        rows = [*screen.history.top, *(screen.buffer[y] for y in range(screen.lines))]
        shown = [("".join(row[x].data for x in range(screen.columns)).rstrip(), _WRAPPED in row) for row in rows]
        while shown and not shown[-1][0]:
            shown.pop()
        return shown

    def rows(self) -> list[str]:
        """All rows, from the first one that has scrolled off to the last one that isn't empty."""
        return [row for row, _ in self._wrapped_rows()]

    def bars(self) -> list[str]:
        """The rows that are bars."""
        return [row for row in self.rows() if BAR.fullmatch(row)]

    def lines(self) -> list[str]:
        """The lines above the bar, each as it was before it was wrapped into rows."""
        lines: list[str] = []
        goes_on = False
        for row, is_wrapped in self._wrapped_rows():
            if BAR.fullmatch(row):
                continue
            text = row.ljust(self._screen.columns) if is_wrapped else row
            if goes_on:
                lines[-1] += text
            elif row:
                lines.append(text)
            goes_on = is_wrapped
        return lines


class Meetings:
    """Where a program waits until the test has looked at it, by files in a folder both know."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def wait(self, name: str) -> None:
        """In the program: say that it has come here, and wait for the test."""
        (self._folder / f"{name}.here").touch()
        while not (self._folder / f"{name}.go").exists():
            time.sleep(0.01)

    def has_come(self, name: str) -> bool:
        """In the test: whether the program has come here."""
        return (self._folder / f"{name}.here").exists()

    def go(self, name: str) -> None:
        """In the test: let the program go on."""
        (self._folder / f"{name}.go").touch()
