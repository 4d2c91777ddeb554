"""Folders of checkpoints for tests of the command line: made, damaged, and looked at as a user would."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from trainloop.__main__ import main
from trainloop.checkpoint import CheckpointStore, FileSystem, KeepInterval, KeepSteps, RetentionPolicy

from .workers.checkpoint_store import ABOUT, small

PREFIX = "python -m trainloop"


class Quick(FileSystem):
    """The real disk without waiting for it."""

    def sync_file(self, file: IO[bytes]) -> None:
        file.flush()

    def sync_dir(self, path: Path) -> None:
        pass


def saved(root: Path, *steps: int, retention: Sequence[RetentionPolicy] = (KeepInterval(1),), **kwargs: Any) -> Path:
    """A folder with checkpoints of these steps; a keyword may be a function of the step."""
    store = CheckpointStore(root, fs=Quick())
    store.open()
    for step in steps:
        about = {key: value(step) if callable(value) else value for key, value in kwargs.items()}
        is_healthy = about.pop("health", True)
        content = about.pop("content", None) or small(step, is_healthy, ema={"w0": torch.full((100,), step / 2)})
        store.save(step, content, **{**ABOUT, **about}, retention=[*retention, KeepSteps(steps)])
    store.close()
    return root


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step_*"))


def contents(root: Path) -> dict[str, Any]:
    """Every name below a folder with what it holds and when it was changed; of folders, too, so that a file that came
    and went again is seen.
    """
    paths = [root, *sorted(root.rglob("*"))]
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `checkpoints`."""
    capsys.readouterr()
    try:
        code = main(["checkpoints", *map(str, arguments)])
    except SystemExit as ex:
        code = int(ex.code or 0)
    return code, *capsys.readouterr()


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 4
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def once(module: Any, name: str, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Have `action` happen right before the first call of a function."""
    real, calls = getattr(module, name), iter([action])

    def wrapped(*args: Any) -> Any:
        next(calls, lambda: None)()
        return real(*args)

    patch.setattr(module, name, wrapped)
