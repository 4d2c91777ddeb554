"""Lists the checkpoints in a folder, by their manifests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from .files import check_regular, open_regular, read_regular
from .foreign import DISTINCT_KINDS, describe_folder, foreign_kind, has_manifest, is_importable
from .layout import (
    MANIFEST,
    SEAL_BYTES,
    TABLES,
    Head,
    Manifest,
    ManifestInfo,
    NewerFormatError,
    complete,
    parse_head,
    parse_step_name,
    seal_of,
    state_file,
    step_name,
)
from .limits import MAX_JSON_BYTES, MAX_WHOLE


def read_head(folder: Path) -> tuple[Head, str]:
    """The content of a checkpoint's `manifest.json`, and its text. The tables are not read.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
        CheckpointError: It is missing or damaged, or is not a manifest of trainloop.
    """
    text = _read_text(folder, MANIFEST)
    return parse_head(text), text


def read_texts(folder: Path) -> tuple[Manifest, tuple[str, str]]:
    """The manifest of a checkpoint, and the texts for `parse_manifest`.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
        CheckpointError: It is missing or damaged, or is not a manifest of trainloop.
    """
    while True:
        head, text = read_head(folder)
        try:
            tables = _read_text(folder, TABLES) if head.tables is not None else ""
            return complete(head, tables), (text, tables)
        except CheckpointError:
            if is_there(folder, head.content["crc32"]):
                raise
            # The run has saved this step again, or removed it, after we read the head. So read again.


def _read_text(folder: Path, name: str) -> str:
    try:
        return read_regular(folder, name, MAX_JSON_BYTES).decode()
    except FileNotFoundError as ex:
        raise CheckpointError(f"{name} is missing") from ex
    except UnicodeDecodeError as ex:
        raise CheckpointError(f"{name} is damaged: it is no text") from ex
    except OSError as ex:
        raise CheckpointError(f"{name} cannot be read ({ex.strerror or ex})") from ex


def is_there(folder: Path, seal: str) -> bool:
    """Whether a folder still has the commit whose manifest has this seal. The run may have removed it, or saved the
    step again.
    """
    try:
        with open_regular(folder, MANIFEST) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - SEAL_BYTES))
            return seal_of(file.read(SEAL_BYTES)) == seal
    except OSError:
        return False


def follow_links(folder: Path) -> Path:
    """The folder that a link leads to. Call once per checkpoint, because the link `latest` of a run moves."""
    while folder.is_symlink():
        folder = folder.parent / os.readlink(folder)
    return folder


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
        CheckpointError: It is missing or damaged, or is not a manifest of trainloop.
    """
    return read_texts(folder)[0]


def read_own_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. If the folder is named after a step, the manifest must have the same step.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
        CheckpointError: It is missing or damaged, is not a manifest of trainloop, or belongs to another step.
    """
    try:
        manifest = read_manifest(folder)
    except NewerFormatError as ex:
        raise NewerFormatError(f"{folder}: {ex}") from ex
    check_own(folder, manifest)
    return manifest


def check_own(folder: Path, manifest: Manifest) -> None:
    """Raise unless a manifest can belong to a checkpoint with this name.

    Raises:
        CheckpointError: The folder is named after another step, or nested state is missing.
    """
    _check_step(folder, manifest)
    # First compare the numbers: a damaged `world_size` could be huge, and the loop below counts up to it.
    has_state = manifest.world_size < len(manifest.files) and state_file(None) in manifest.files
    if not has_state or any(state_file(rank) not in manifest.files for rank in range(manifest.world_size)):
        raise CheckpointError(
            f"{MANIFEST} is damaged: the nested state of the run, or of one of {manifest.world_size} ranks, is none of"
            " its files"
        )


def _check_step(folder: Path, info: ManifestInfo) -> None:
    if parse_step_name(folder.name) not in (info.step, None):
        raise CheckpointError(f"{MANIFEST} is that of step {info.step}")


def read_own_info(folder: Path) -> ManifestInfo:
    """The information by which a checkpoint is chosen and kept. Reads `manifest.json`; checks only the size of the
    tables.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
        CheckpointError: The manifest is missing or damaged, is not trainloop's, or belongs to another step.
    """
    head, _ = read_head(folder)
    if head.tables is None:
        manifest = complete(head, "")
        check_own(folder, manifest)
        return manifest.info()
    _check_step(folder, head.info)
    try:
        num_bytes = check_regular(folder, TABLES)
    except OSError as ex:
        raise CheckpointError(f"{TABLES} cannot be read ({ex.strerror or ex})") from ex
    if num_bytes != head.tables.num_bytes:
        raise CheckpointError(f"{TABLES} is damaged: it has {num_bytes} bytes instead of {head.tables.num_bytes}")
    return head.info


@dataclass(frozen=True)
class Entry:
    """A folder with a step's name, and the information in its manifest, or the problem with the manifest."""

    folder: Path
    info: ManifestInfo | None
    problem: str = ""


class Catalog:
    """The checkpoints in a folder. A manifest is read again only if it has changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._cache: dict[str, tuple[tuple[int, ...], ManifestInfo]] = {}

    def entries(self) -> list[Entry]:
        """All folders with a step's name: the unreadable ones first, the others by `seq`.

        Raises:
            NewerFormatError: A newer trainloop has written here, so the latest checkpoint is unknown.
        """
        try:
            names = [path.name for path in self.root.iterdir() if parse_step_name(path.name) is not None]
        except FileNotFoundError:
            names = []
        entries = [self._entry(name) for name in names]
        self._cache = {name: cached for name, cached in self._cache.items() if name in names}
        return sorted(entries, key=lambda entry: (entry.info.seq if entry.info else -1, entry.folder.name))

    def infos(self) -> list[ManifestInfo]:
        """The information in the readable manifests, by `seq`."""
        return [entry.info for entry in self.entries() if entry.info is not None]

    def next_seq(self) -> int:
        """Number of the next commit.

        Raises:
            CheckpointError: The numbers are used up.
        """
        newest = max(self.infos(), key=lambda info: info.seq, default=None)
        if newest is not None and newest.seq >= MAX_WHOLE:
            raise CheckpointError(
                f"{step_name(newest.step)} says that it is commit {newest.seq}, after which none can be counted. No"
                " run has written that: remove it"
            )
        return newest.seq + 1 if newest is not None else 1

    def explicit(self, which: int | str | Path) -> Path:
        """The folder of a step, or the given folder if it is a checkpoint.

        Raises:
            CheckpointError: There is no such checkpoint. The message says what is there.
        """
        if isinstance(which, int):
            folder = self.root / step_name(which)
            if not folder.is_dir():
                steps = ", ".join(str(info.step) for info in sorted(self.infos(), key=lambda info: info.step))
                raise CheckpointError(f"{self.root} has no checkpoint of step {which}, only of: {steps or 'no step'}")
            return folder
        if not has_manifest(Path(which)):
            raise CheckpointError(f"{which} is not a checkpoint of trainloop: it {describe_folder(Path(which))}")
        return follow_links(Path(which))

    def latest(self) -> list[Entry]:
        """All folders with a step's name, in the order in which a load tries them: the healthy ones from new to old,
        then those with non-finite parameters, then those without a readable manifest.

        Raises:
            CheckpointError: There are none, but the folder has checkpoints of another tool.
        """
        entries = self.entries()
        if not entries and self.root.is_dir():
            for path in (self.root, *filter(Path.is_dir, sorted(self.root.iterdir()))):
                if foreign_kind(path) in DISTINCT_KINDS:
                    raise CheckpointError(
                        f"{path} {describe_folder(path)}, and {self.root} has no checkpoint of trainloop. To start"
                        " anew, give this run another folder"
                        + (f"; to begin with it, name it: `load={str(path)!r}`" if is_importable(path) else "")
                    )
        return sorted(
            entries, key=lambda entry: (entry.info.health, entry.info.seq) if entry.info else (False, -1), reverse=True
        )

    def _entry(self, name: str) -> Entry:
        folder = self.root / name
        try:
            stat = (folder / MANIFEST).stat()
            key: tuple[int, ...] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except OSError:
            key = ()
        cached = self._cache.get(name)
        if cached is not None and cached[0] == key:
            return Entry(folder, cached[1])
        try:
            info = read_own_info(folder)
        except NewerFormatError as ex:
            raise NewerFormatError(f"{folder}: {ex}") from ex
        except CheckpointError as ex:
            return Entry(folder, None, str(ex))
        self._cache[name] = (key, info)
        return Entry(folder, info)
