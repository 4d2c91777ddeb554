"""How the folder of checkpoints changes, one rename at a time, so that it holds a whole checkpoint at every moment.

Commit of a step that exists already:

1. `step_5` -> `.replaced-step_5-x`           the old one is whole, under a name that nobody loads
2. `.tmp-step_5-x` -> `step_5`, sync          the new one is there
3. remove `.replaced-…`

A run that dies after 1 leaves no `step_5`; the next run's `clean_up` gives the old one its name back. One that dies
later leaves something to remove.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ...errors import CheckpointError
from ..format.catalog import read_manifest
from ..format.layout import LATEST, REPLACED, TEMPORARY, TRASH, step_name
from ..format.verification import is_whole
from .fs import FileSystem
from .lock import FolderLock


def make_folder(fs: FileSystem, folder: Path) -> None:
    """Make the folder of checkpoints, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    fs.make_dir(folder)
    for path in reversed(missing):
        fs.sync_dir(path.parent)


def temporary_folder(root: Path, step: int, token: str) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f"{TEMPORARY}{step_name(step)}-{token}"


def publish(fs: FileSystem, temporary: Path, step: int, token: str) -> list[Path]:
    """Give a complete checkpoint its name, durably.

    Returns:
        What it replaced, to be discarded: nothing or one folder.
    """
    root = temporary.parent
    target, replaced = root / step_name(step), root / f"{REPLACED}{step_name(step)}-{token}"
    if not os.path.lexists(target):
        fs.rename(temporary, target)
        fs.sync_dir(root)
        return []
    fs.rename(target, replaced)
    try:
        fs.rename(temporary, target)
    except OSError:
        fs.rename(replaced, target)
        raise
    fs.sync_dir(root)
    return [replaced]


def point_latest(fs: FileSystem, root: Path, step: int, token: str) -> None:
    """Point the link `latest`, which is for people, to a step."""
    fs.replace_symlink(root / LATEST, step_name(step), root / f"{TEMPORARY}{LATEST}-{token}")


def discard(fs: FileSystem, folders: Sequence[Path], token: str) -> None:
    """Remove checkpoints such that none is ever seen with only a part of its files."""
    trashed = [folder.with_name(f"{TRASH}{folder.name}-{token}") for folder in folders]
    for folder, trash in zip(folders, trashed, strict=True):
        fs.rename(folder, trash)
    if folders:
        fs.sync_dir(folders[0].parent)
    for trash in trashed:
        fs.remove_tree(trash)


def take_folder(fs: FileSystem, root: Path, logger: logging.Logger, remedy: str | None = None) -> FolderLock:
    """Take a folder for this process, and put right what a run left behind that died. On a full disk the leftovers go
    first, or the lock file would have no room.

    Args:
        fs: The disk.
        root: The folder.
        logger: As for `clean_up`.
        remedy: What whoever wants the folder is to do while another run holds it. None: wait, or take another folder.

    Raises:
        CheckpointError: Another run holds it.
    """
    about = {} if remedy is None else {"remedy": remedy}
    lock = FolderLock(root, **about, make_room=lambda: clean_up(fs, root, logger))
    try:
        clean_up(fs, root, logger)
    except BaseException:
        lock.release()
        raise
    return lock


def clean_up(fs: FileSystem, root: Path, logger: logging.Logger) -> None:
    """Put right what a run left behind that died while it wrote. Nobody else may be writing.

    What cannot be removed is left, with a warning: it harms nobody.
    """
    replaced = []
    for path in root.glob(f"{REPLACED}*"):
        try:
            manifest = read_manifest(path)
            if is_whole(path, manifest):
                replaced.append((manifest.seq, manifest.step, path))
        except CheckpointError:
            continue
    for _, step, path in sorted(replaced, reverse=True):
        if not os.path.lexists(root / step_name(step)):
            fs.rename(path, root / step_name(step))
            fs.sync_dir(root)
            logger.warning(f"{root / step_name(step)}: the run before died while it replaced this step; it is back.")
    for prefix in (TEMPORARY, REPLACED, TRASH):
        for path in root.glob(f"{prefix}*"):
            try:
                fs.remove_tree(path)
            except OSError as ex:
                logger.warning(f"{path} is left over from a run that died, and cannot be removed: {ex}")
