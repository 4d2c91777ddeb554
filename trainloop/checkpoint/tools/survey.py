"""What a folder of checkpoints holds, looked at without its lock, while a run may be writing there."""

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
"""Which files of a checkpoint to look at."""

_LEFTOVERS = {
    TEMPORARY: "a save under way, or one that died",
    REPLACED: "the old one of a step that is saved again, or of a save that died",
    TRASH: "a checkpoint being removed, or left by a removal that died",
}


@dataclass(frozen=True)
class Finding:
    """A checkpoint as it was found."""

    folder: Path
    info: ManifestInfo | None
    """None: the manifest cannot be read."""
    problems: Sequence[str]
    """What is wrong, a sentence each that begins with the file's path."""
    num_bytes: int
    """On the disk."""

    @property
    def state(self) -> str:
        """One word: "healthy", "non-finite" (whole, but not all parameters are finite), "damaged" or "unreadable"."""
        if self.info is None:
            return "unreadable"
        return "damaged" if self.problems else "healthy" if self.info.health else "non-finite"


@dataclass(frozen=True)
class Leftover:
    """Something in the folder that no load considers."""

    path: Path
    what: str
    num_bytes: int
    """On the disk."""
    time: float
    """When its last file was written, in seconds since 1970."""


def look_into(folder: Path, verify: Verify, select: Select) -> tuple[Manifest | None, list[str]] | None:
    """Read a checkpoint's manifest and verify files of it.

    Args:
        folder: The checkpoint.
        verify: How deep; "full" reads every byte.
        select: Which of its files.

    Returns:
        The manifest if it can be read, and what is wrong, a sentence each; None: the checkpoint is gone, or went
        meanwhile.

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
        # Here the run has saved this step again: the files are not those of the manifest that was read.


def examine(folder: Path, verify: Verify) -> Finding | None:
    """Look at one checkpoint; see `look_into`."""
    seen = look_into(folder, verify, lambda manifest: manifest.files)
    if seen is None:
        return None
    manifest, problems = seen
    return Finding(folder, manifest.info() if manifest is not None else None, problems, _measure(folder)[0])


def survey(root: Path, verify: Verify) -> list[Finding]:
    """Look at all checkpoints of a folder.

    Returns:
        The unreadable ones, then the others from the oldest commit to the newest.

    Raises:
        NewerFormatError: A newer trainloop has written here.
    """
    findings = [examine(entry.folder, verify) for entry in Catalog(root).entries()]
    there = [finding for finding in findings if finding is not None]
    return sorted(there, key=lambda finding: finding.info.seq if finding.info is not None else -1)


def leftovers(root: Path) -> list[Leftover]:
    """What runs left behind that died, or are at work on."""
    return [
        Leftover(path, what, *_measure(path))
        for prefix, what in _LEFTOVERS.items()
        for path in sorted(root.glob(f"{prefix}*"))
    ]


def run_retention(findings: Sequence[Finding]) -> Sequence[Mapping[str, Any]] | None:
    """The policies that the newest whole checkpoint names; None: it names none, or there is no such."""
    infos = [finding.info for finding in findings if finding.info is not None and not finding.problems]
    return infos[-1].retention if infos else None


def is_one_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint, not of a folder of checkpoints."""
    return path.is_dir() and (has_manifest(path) or parse_step_name(path.resolve().name) is not None)


def check_folder(root: Path) -> None:
    """Refuse what cannot be a folder of checkpoints; an empty one may be.

    Raises:
        ValueError: It is none; the error says what it looks like.
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
    """Bytes of a file or of all files in a folder, and when the last of them was written; zeros if it is gone."""
    num_bytes, newest = 0, 0.0
    for place in (path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)):
        try:
            status = place.lstat()
        except OSError:
            continue
        num_bytes += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        newest = max(newest, status.st_mtime)
    return num_bytes, newest
