"""Changes the folder of checkpoints by one rename at a time, so that it has a complete checkpoint at every moment.

Commit of a step that exists already:

1. `step_5` -> `.replaced-step_5-x`           the old one is complete, under a name that is never loaded
2. `.tmp-step_5-x` -> `step_5`, sync          the new one is in place
3. remove `.replaced-…`

If a run dies after 1, there is no `step_5`; the next run's `clean_up` renames the old one back. If it dies later, only
leftovers have to be removed.
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
    """The folder in which a checkpoint is written before it is complete."""
    return root / f"{TEMPORARY}{step_name(step)}-{token}"


def publish(fs: FileSystem, temporary: Path, step: int, token: str) -> list[Path]:
    """Give a complete checkpoint its final name, durably.

    Returns:
        The replaced checkpoint, which must be discarded: nothing or one folder.
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
    """Remove checkpoints. Readers never see a checkpoint with only a part of its files."""
    trashed = [folder.with_name(f"{TRASH}{folder.name}-{token}") for folder in folders]
    for folder, trash in zip(folders, trashed, strict=True):
        fs.rename(folder, trash)
    if folders:
        fs.sync_dir(folders[0].parent)
    for trash in trashed:
        fs.remove_tree(trash)


def take_folder(fs: FileSystem, root: Path, logger: logging.Logger, remedy: str | None = None) -> FolderLock:
    """Lock a folder for this process, and clean up after a run that died. If the disk is full, this removes leftovers
    first, because the lock file would not fit.

    Args:
        fs: The disk.
        root: The folder.
        logger: For the warnings of `clean_up`.
        remedy: Advice in the error message if another run holds the folder. None: wait, or use another folder.

    Raises:
        CheckpointError: Another run holds the folder.
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
    """Clean up after a run that died while it wrote. No other process may be writing.

    If a leftover can't be removed, it stays, with a warning. It does no harm.
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
            logger.warning(
                f"{root / step_name(step)}: a run died while it replaced this checkpoint. The old one is restored."
            )
    for prefix in (TEMPORARY, REPLACED, TRASH):
        for path in root.glob(f"{prefix}*"):
            try:
                fs.remove_tree(path)
            except OSError as ex:
                logger.warning(f"{path} is left over from a run that died, and cannot be removed: {ex}")
