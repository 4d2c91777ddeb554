"""One run per folder: a lock that ends with its process."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..format.files import read_regular
from ..format.layout import LOCK
from ..format.nested import parse_json

_PATIENCE_SECONDS = 3.0
"""How long to wait for a run that was just killed to disappear."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_MAX_BYTES = 2**12
"""Limit of a lock file."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """An exclusive lock (flock) on a folder, held from construction until `release` or the end of the process.

    If the file system doesn't support flock, it locks nothing.

    Attributes:
        token: The text in the lock file. It is unique to this lock.
    """

    def __init__(
        self,
        folder: Path,
        remedy: str = "Wait for its end, or give this run another folder",
        make_room: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            folder: The folder.
            remedy: Advice in the error message if another run holds the folder.
            make_room: Removes leftovers. Called if the disk is full, while no other run holds the folder.

        Raises:
            CheckpointError: Another run holds the folder.
        """
        self._folder, self._descriptor = folder, -1
        self.token = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._descriptor = self._create(remedy, make_room)
            _lock(self._descriptor, folder, remedy)
            try:
                self._sign()
            except OSError as ex:
                if make_room is None or ex.errno not in _FULL:
                    raise
                make_room()
                self._sign()
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def check(self) -> None:
        """Check that this run still holds the folder. Somebody may have removed it, or its lock file, by hand.

        Raises:
            CheckpointError: It doesn't; another run may write there.
        """
        if _token_in(self._folder) != self.token:
            is_taken = (self._folder / LOCK).exists()
            why = f"{LOCK} is that of another run ({_holder(self._folder)})" if is_taken else f"{LOCK} was removed"
            raise CheckpointError(
                f"{self._folder} is no longer this run's: {why}, and two runs must not write into one folder. Stop the"
                " other one, if there is one, and start this one again"
            )

    def release(self) -> None:
        """Release the folder. The lock file stays: if we unlinked it, it could be another run's by then."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.release()  # a store that was not closed must not block the next one of this process

    def _create(self, remedy: str, make_room: Callable[[], None] | None) -> int:
        try:
            return os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as ex:
            if make_room is None or ex.errno not in _FULL:
                raise
        # Without the file, only the folder itself can be locked.
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # NFS can't lock folders
                _lock(descriptor, self._folder, remedy)
            make_room()
        finally:
            os.close(descriptor)
        return os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)

    def _sign(self) -> None:
        """Write the holder of the lock into the lock file."""
        os.ftruncate(self._descriptor, 0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime(), "token": self.token}
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        os.fsync(self._descriptor)  # so that the other nodes see it


def _lock(descriptor: int, folder: Path, remedy: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as ex:
            if ex.errno in _UNSUPPORTED:
                return
            if ex.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > end:
            raise CheckpointError(f"{folder} is in use by another run ({_holder(folder)}). {remedy}")
        time.sleep(0.05)


def is_visible(folder: Path, token: str) -> bool:
    """Whether this process sees a lock file with `token`. Waits a little for network file systems."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with suppress(OSError):
            os.listdir(folder)  # makes NFS refresh
        if _token_in(folder) == token:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def _holder(folder: Path) -> str:
    try:
        holder = _read(folder)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has not said its name"


def _token_in(folder: Path) -> str | None:
    """The token in the lock file of a folder. None: there is no lock file, or it cannot be read."""
    try:
        return str(_read(folder)["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(folder: Path) -> Any:
    return parse_json(read_regular(folder, LOCK, _MAX_BYTES))


def _close_in_child() -> None:
    """Release the locks in a forked process (a data loader worker), which may live a little longer than the run."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
