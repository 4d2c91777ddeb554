"""All operations that change the disk, as methods of one object, so that tests can make any of them fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..format.integrity import Buffer

_AHEAD = 2**24
"""After this many bytes the disk is told to start writing. It then works while the rest is copied into the system's
cache. Both take about equally long; together they take two fifths less time."""


def _start_writeback(file: IO[bytes], begin: int, end: int) -> None:
    """Make the disk start writing bytes that `sync_file` will wait for."""
    if hasattr(os, "posix_fadvise"):  # this makes Linux write; on other systems it does no harm
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


class FileSystem:
    """The real disk. Data becomes durable only by a sync: a file's bytes by `sync_file`, its name by `sync_dir`."""

    def make_dir(self, path: Path) -> None:
        """Make the folder `path` and its parents, if they don't exist."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, buffers: Iterable[Buffer], sync: bool = True) -> None:
        """Write `buffers` to a new file, `path`, and make its bytes durable. Without `sync`, call `sync_path` for that
        later.
        """
        with open(path, "xb") as file:
            begin = end = 0
            for buffer in buffers:
                for start in range(0, len(buffer), _AHEAD):
                    end += file.write(memoryview(buffer)[start : start + _AHEAD])
                    if end - begin >= _AHEAD:
                        file.flush()
                        _start_writeback(file, begin, end)
                        begin = end
            if sync:
                self.sync_file(file)

    def sync_path(self, path: Path) -> None:
        """Make the bytes of the existing file `path` durable."""
        with open(path, "rb+") as file:
            self.sync_file(file)

    def sync_file(self, file: IO[bytes]) -> None:
        """Make the bytes of the open file `file` durable."""
        file.flush()
        os.fsync(file.fileno())

    def sync_dir(self, path: Path) -> None:
        """Make the names in the folder `path` durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename the file or folder `source` to `target`, atomically."""
        os.rename(source, target)

    def replace_symlink(self, link: Path, target: str, beside: Path) -> None:
        """Point `link` to `target`, atomically. Unlinking it first would leave readers without it for a moment.

        Args:
            link: The link, which may exist.
            target: Its new target.
            beside: A free name in the same folder, for temporary use.
        """
        os.symlink(target, beside)
        try:
            os.replace(beside, link)
        except BaseException:  # `link` is a folder, for example in a copy that followed links
            with suppress(OSError):
                os.unlink(beside)
            raise

    def remove_tree(self, path: Path) -> None:
        """Remove `path`: a file, a link, or a folder with its content."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def free_bytes(self, path: Path) -> int:
        """Free bytes on the disk that holds `path`."""
        return shutil.disk_usage(path).free
