"""One run a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import time
import weakref
from pathlib import Path

from ...errors import CheckpointError
from ..format.layout import LOCK

_PATIENCE_SECONDS = 3.0
"""How long a run that was just killed may take to be gone."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """An exclusive lock (flock) on a folder, held from construction to `release` or the end of the process.

    Where the file system has no flock it locks nothing.

    Attributes:
        token: What was written into the lock file, a text that no other run writes.
    """

    def __init__(self, folder: Path, remedy: str = "Wait for its end, or give this run another folder") -> None:
        """
        Args:
            folder: The folder.
            remedy: What whoever wants the folder is to do while another run holds it.

        Raises:
            CheckpointError: Another run holds it.
        """
        self._descriptor = -1
        self.token = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(folder, remedy)
            os.ftruncate(self._descriptor, 0)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime(), "token": self.token}
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
            os.fsync(self._descriptor)  # so that the other nodes see it
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def release(self) -> None:
        """Let another run have the folder. The file stays: whoever unlinked it could unlink another run's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.release()  # a store that nobody closed must not lock out the next one of this process

    def _lock(self, folder: Path, remedy: str) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """Whether the lock file that this process sees is the one with `token`; waits a little for network file systems."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            os.listdir(folder)  # has NFS look again
            if json.loads((folder / LOCK).read_text()).get("token") == token:
                return True
        except (OSError, ValueError):
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK).read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "which has not said its name"


def _close_in_child() -> None:
    """A forked process (a worker of a data loader) that outlives the run for a moment must not keep its lock."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
