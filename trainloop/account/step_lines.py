"""A file of lines that belong to steps, in the order of the steps. It can be read while it grows."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..checkpoint.disk.fs import FileSystem
from .events import cut_torn_line

TEMPORARY = ".tmp-"
"""Start of the name of a file that is being written."""


def write_whole(file: Path, content: bytes, temporary: Path | None = None) -> None:
    """Write to a temporary file, then rename: `file` is complete or doesn't exist, even after a loss of power.

    Args:
        file: It is replaced if it exists. Its folder is made.
        content: Content of the file.
        temporary: A free name on the same disk. None: one in the same folder.
    """
    disk = FileSystem()
    disk.make_dir(file.parent)
    temporary = file.with_name(f"{TEMPORARY}{uuid.uuid4().hex}") if temporary is None else temporary
    try:
        disk.write(temporary, [content])
        disk.rename(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class StepLines:
    """Writes such a file. Each method may raise an `OSError`; the file is then unchanged.

    The file is opened for each write, which takes a few microseconds. So it may be moved or replaced at any time.

    Args:
        path: The file. Its folder is made.
        step_of: Returns the step of a line without its end. None: the line has no step, such as the header of a table.
    """

    def __init__(self, path: Path, step_of: Callable[[bytes], int | None]) -> None:
        self.path = path
        self._step_of = step_of
        self._last: tuple[int, bytes] = (0, b"")  # start of the last line, and the line

    def cut(self, step: int) -> int:
        """Cut off the lines of later steps, and an incomplete line.

        Returns:
            The number of lines of later steps.
        """
        self._last = (0, b"")
        size = cut_torn_line(self.path)
        if not size:
            return 0
        position, num_cut, end = 0, 0, size
        with self.path.open("rb") as file:
            for line in file:
                of = self._step_of(line[:-1])
                if num_cut or (of is not None and of > step):
                    end = min(end, position)
                    num_cut += of is not None
                else:
                    self._last = (position, line)
                position += len(line)
        if end < size:
            os.truncate(self.path, end)
        return num_cut

    @property
    def last(self) -> bytes:
        """The last line, with its end. Empty: there is none."""
        return self._last[1]

    def append(self, line: bytes) -> None:
        """Write a line, including its end, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(file).st_size
            try:
                written = os.write(file, line)
                while written < len(line):  # the disk is full, so the next call raises
                    written += os.write(file, line[written:])
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        self._last = (size, line)

    def replace_last(self, line: bytes) -> None:
        """Write a line in place of the last one."""
        position, last = self._last
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        if not last or size != position + len(last):  # somebody has changed the file
            self.append(line)
            return
        file = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(file, line, position)  # one call, so that a killed process leaves the old line or the new one
            if len(line) < len(last):
                os.ftruncate(file, position + len(line))
        finally:
            os.close(file)
        self._last = (position, line)

    def rewrite(self, content: bytes) -> None:
        """Replace the whole file atomically. Its last line is then the last line of `content`."""
        write_whole(self.path, content)
        start = content.rfind(b"\n", 0, len(content) - 1) + 1
        self._last = (start, content[start:])

    def sync(self) -> None:
        """Make the written data durable."""
        with suppress(FileNotFoundError):
            FileSystem().sync_path(self.path)
