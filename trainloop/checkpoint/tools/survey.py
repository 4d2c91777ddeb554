"""Examines a folder of checkpoints without its lock, while a run may be writing there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ...errors import CheckpointError
from ..format.catalog import Catalog, read_own_manifest
from ..format.foreign import describe_folder, has_manifest
from ..format.layout import (
    LATEST,
    MANIFEST,
    REPLACED,
    TEMPORARY,
    TRASH,
    Manifest,
    ManifestInfo,
    NewerFormatError,
    parse_step_name,
)
from ..format.verification import Verify, find_problems

Select: TypeAlias = "Callable[[Manifest], Collection[str]]"
"""Chooses the files of a checkpoint to verify."""

_LEFTOVERS = {
    TEMPORARY: "a save under way, or one that died",
    REPLACED: "the old one of a step that is saved again, or of a save that died",
    TRASH: "a checkpoint being removed, or left by a removal that died",
}


@dataclass(frozen=True)
class Finding:
    """The state of one checkpoint."""

    folder: Path
    info: ManifestInfo | None
    """None: the manifest cannot be read."""
    problems: Sequence[str]
    """One sentence per problem, each beginning with the file's path."""
    num_bytes: int
    """Size on the disk."""

    @property
    def state(self) -> str:
        """One word: "healthy", "non-finite" (intact, but some parameter is not finite), "damaged" or "unreadable"."""
        if self.info is None:
            return "unreadable"
        return "damaged" if self.problems else "healthy" if self.info.health else "non-finite"


@dataclass(frozen=True)
class Leftover:
    """Something in the folder that a load ignores."""

    path: Path
    what: str
    num_bytes: int
    """Size on the disk."""
    time: float
    """When its last file was written, in seconds since 1970."""


def look_into(folder: Path, verify: Verify, select: Select) -> tuple[Manifest | None, list[str]] | None:
    """Read a checkpoint's manifest and verify some of its files.

    Args:
        folder: The checkpoint.
        verify: How thoroughly; "full" reads every byte.
        select: Chooses the files.

    Returns:
        The manifest if it can be read, and one sentence per problem. None: the checkpoint doesn't exist any more.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
    """
    while True:
        manifest, problems = _read(folder)
        if manifest is not None:
            problems = find_problems(folder, manifest, select(manifest), verify)
        if not problems:
            return manifest, problems
        if not folder.exists():
            return None
        if _read(folder)[0] == manifest:
            return manifest, problems
        # The run has saved this step again, so the files don't belong to the manifest that was read. Try again.


def examine(folder: Path, verify: Verify) -> Finding | None:
    """Examine one checkpoint; see `look_into`."""
    seen = look_into(folder, verify, lambda manifest: manifest.files)
    if seen is None:
        return None
    manifest, problems = seen
    return Finding(folder, manifest.info() if manifest is not None else None, problems, _measure(folder)[0])


def survey(root: Path, verify: Verify) -> list[Finding]:
    """Examine all checkpoints of a folder.

    Returns:
        The unreadable ones, then the others from the oldest commit to the newest.

    Raises:
        NewerFormatError: A newer trainloop has written here.
    """
    findings = [examine(entry.folder, verify) for entry in Catalog(root).entries()]
    there = [finding for finding in findings if finding is not None]
    return sorted(there, key=lambda finding: finding.info.seq if finding.info is not None else -1)


def leftovers(root: Path) -> list[Leftover]:
    """Folders of saves and removals that are in progress or have died."""
    return [
        Leftover(path, what, *_measure(path))
        for prefix, what in _LEFTOVERS.items()
        for path in sorted(root.glob(f"{prefix}*"))
    ]


def run_retention(findings: Sequence[Finding]) -> Sequence[Mapping[str, Any]] | None:
    """The policies in the manifest of the newest intact checkpoint. None: it has none, or there is no checkpoint."""
    infos = [finding.info for finding in findings if finding.info is not None and not finding.problems]
    return infos[-1].retention if infos else None


def is_one_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint, not of a folder of checkpoints."""
    return path.is_dir() and (has_manifest(path) or parse_step_name(path.resolve().name) is not None)


def check_folder(root: Path) -> None:
    """Raise for a path that cannot be a folder of checkpoints. An empty folder is accepted.

    Raises:
        ValueError: It is not one; the message says what it looks like.
    """
    if is_one_checkpoint(root):
        raise ValueError(f"{root} is a checkpoint itself. Give the folder that it lies in: {root.resolve().parent}")
    names = [path.name for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
    if root.is_dir() and (not names or LATEST in names or any(parse_step_name(name) is not None for name in names)):
        return
    below = [path.parent for name in sorted(names) for path in (root / name).glob(f"*/{MANIFEST}")]
    hint = f". There are checkpoints in {below[0].parent}" if below else ""
    raise ValueError(f"{root} holds no checkpoints of trainloop: it {describe_folder(root)}{hint}")


def _read(folder: Path) -> tuple[Manifest | None, list[str]]:
    try:
        return read_own_manifest(folder), []
    except NewerFormatError:
        raise
    except CheckpointError as ex:
        return None, [str(ex)]


def _measure(path: Path) -> tuple[int, float]:
    """Size of a file or of all files in a folder, and when the last of them was written. Zeros if it is gone."""
    num_bytes, newest = 0, 0.0
    for place in (path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)):
        try:
            status = place.lstat()
        except OSError:
            continue
        num_bytes += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        newest = max(newest, status.st_mtime)
    return num_bytes, newest
