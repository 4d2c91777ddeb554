"""Opens the files of a checkpoint. Only regular files inside its folder are opened; links are not followed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

_FLAGS = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):  # some systems lack some of these
    _FLAGS |= getattr(os, _name, 0)


def check_regular(folder: Path, path: str) -> int:
    """Raise unless a path leads to a regular file; see `open_regular`.

    Returns:
        Its size in bytes.

    Raises:
        OSError: It doesn't exist, or is something else.
    """
    place = folder
    *parents, name = path.split("/")
    for part in parents:
        place = place / part
        _check_kind(place, place.lstat(), stat.S_ISDIR, "a folder")
    status = (place / name).lstat()
    _check_kind(place / name, status, stat.S_ISREG, "a regular file")
    return status.st_size


def open_regular(folder: Path, path: str) -> BufferedReader:
    """Open a file for reading.

    Args:
        folder: The checkpoint. It may be reached through links.
        path: Path of the file in `folder`, with "/" between the parts. No part of it may be a link.

    Raises:
        OSError: It doesn't exist, cannot be opened, or isn't a regular file (a FIFO would block; a device never ends).
    """
    check_regular(folder, path)  # before opening it, because opening a device can have effects
    place = folder / path
    descriptor = os.open(place, _FLAGS)
    try:
        _check_kind(place, os.fstat(descriptor), stat.S_ISREG, "a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise


def read_regular(folder: Path, path: str, max_bytes: int) -> bytes:
    """All bytes of a file; see `open_regular`.

    Raises:
        OSError: It cannot be opened, or has more than `max_bytes`.
    """
    with open_regular(folder, path) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes:
            content = file.read(max_bytes + 1)
            if len(content) <= max_bytes:
                return content
    raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes, which is the most that is read", path)


def _check_kind(place: Path, status: os.stat_result, is_kind: Callable[[int], bool], what: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "it is a link, and links in a checkpoint are not followed", str(place))
    if not is_kind(status.st_mode):
        raise OSError(errno.EINVAL, f"it is not {what}", str(place))
