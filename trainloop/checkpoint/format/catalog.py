"""Which checkpoints a folder holds, as their manifests say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from .foreign import DISTINCT_KINDS, describe_folder, foreign_kind, is_importable
from .layout import MANIFEST, Manifest, ManifestInfo, NewerFormatError, parse_manifest, parse_step_name, step_name


def read_manifest_text(folder: Path) -> str:
    """The text of a checkpoint's manifest, which `parse_manifest` takes.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return (folder / MANIFEST).read_bytes().decode()
    except FileNotFoundError as ex:
        raise CheckpointError(f"{MANIFEST} is missing") from ex
    except UnicodeDecodeError as ex:
        raise CheckpointError(f"{MANIFEST} is damaged: it is no text") from ex
    except OSError as ex:
        raise CheckpointError(f"{MANIFEST} cannot be read ({ex.strerror or ex})") from ex


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
        CheckpointError: It is missing, damaged, or not trainloop's.
    """
    return parse_manifest(read_manifest_text(folder))


def read_own_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, whose step must be that of the folder if this has a step's name.

    Raises:
        NewerFormatError: Only a newer trainloop can read it.
        CheckpointError: It is missing, damaged, not trainloop's, or that of another step.
    """
    try:
        manifest = read_manifest(folder)
    except NewerFormatError as ex:
        raise NewerFormatError(f"{folder}: {ex}") from ex
    if parse_step_name(folder.name) not in (manifest.step, None):
        raise CheckpointError(f"{MANIFEST} is that of step {manifest.step}")
    return manifest


@dataclass(frozen=True)
class Entry:
    """A folder with a step's name: its manifest, or what is wrong with it."""

    folder: Path
    info: ManifestInfo | None
    problem: str = ""


class Catalog:
    """The checkpoints in a folder. Manifests are read again only when they have changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._cache: dict[str, tuple[tuple[int, ...], ManifestInfo]] = {}

    def entries(self) -> list[Entry]:
        """All folders with a step's name; the unreadable ones first, then by `seq`.

        Raises:
            NewerFormatError: A newer trainloop has written here; what is the latest cannot be told.
        """
        try:
            names = [path.name for path in self.root.iterdir() if parse_step_name(path.name) is not None]
        except FileNotFoundError:
            names = []
        entries = [self._entry(name) for name in names]
        self._cache = {name: cached for name, cached in self._cache.items() if name in names}
        return sorted(entries, key=lambda entry: (entry.info.seq if entry.info else -1, entry.folder.name))

    def infos(self) -> list[ManifestInfo]:
        """What the readable manifests say, by `seq`."""
        return [entry.info for entry in self.entries() if entry.info is not None]

    def next_seq(self) -> int:
        """Number of the next commit."""
        return max((info.seq for info in self.infos()), default=0) + 1

    def explicit(self, which: int | str | Path) -> Path:
        """The folder of a step, or the folder itself if it is a checkpoint.

        Raises:
            CheckpointError: There is none; the error says what is there.
        """
        if isinstance(which, int):
            folder = self.root / step_name(which)
            if not folder.is_dir():
                steps = ", ".join(str(info.step) for info in sorted(self.infos(), key=lambda info: info.step))
                raise CheckpointError(f"{self.root} has no checkpoint of step {which}, only of: {steps or 'no step'}")
            return folder
        folder = Path(which)
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder} is not a checkpoint of trainloop: it {describe_folder(folder)}")
        return folder

    def latest(self) -> list[Entry]:
        """All folders with a step's name in the order in which they are to be tried: the healthy from new to old, then
        those with non-finite parameters; at the end those without a readable manifest.

        Raises:
            CheckpointError: There are none, but the folder holds checkpoints that somebody else has written.
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
            info = read_own_manifest(folder).info()
        except NewerFormatError:
            raise
        except CheckpointError as ex:
            return Entry(folder, None, str(ex))
        self._cache[name] = (key, info)
        return Entry(folder, info)
