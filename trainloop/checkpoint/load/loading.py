"""Finds the checkpoint to load; all ranks together verify it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..agreement import Ranks
from ..format.catalog import Catalog, Entry, read_manifest_text
from ..format.integrity import Verify, find_problems
from ..format.layout import Manifest, NewerFormatError, parse_manifest
from ..sharding import split_by_bytes
from .reader import Checkpoint


@dataclass
class Found:
    """What a search ended with."""

    checkpoint: Checkpoint | None
    damaged: dict[Path, str] = field(default_factory=dict)
    """The ones that were tried before, and what is wrong with each."""


def find_explicit(catalog: Catalog, which: int | str | Path, verify: Verify) -> Found:
    """The checkpoint of a step or path. Call on every rank.

    Raises:
        CheckpointError: It is not there, or damaged.
    """
    ranks = Ranks()
    folder = ranks.do(_nothing, lambda _: catalog.explicit(which), "Cannot load the checkpoint")
    manifest, problem = _try(folder, verify, ranks)
    if manifest is None:
        raise CheckpointError(f"{folder} is damaged: {problem}. It was asked for by name, so no other is loaded.")
    return Found(Checkpoint(folder, manifest))


def find_latest(catalog: Catalog, verify: Verify, logger: logging.Logger) -> Found:
    """The newest healthy checkpoint that is whole; if none is healthy, the newest. Call on every rank.

    Raises:
        CheckpointError: There are some, but all are damaged.
    """
    ranks = Ranks()
    entries: list[Entry] = ranks.do(_nothing, lambda _: catalog.latest(), "Cannot load the latest checkpoint")
    found = Found(None, {entry.folder: entry.problem for entry in entries if entry.info is None})
    for entry in entries:
        if entry.info is not None:
            manifest, problem = _try(entry.folder, verify, ranks)
            if manifest is not None:
                found.checkpoint = Checkpoint(entry.folder, manifest)
                break
            found.damaged[entry.folder] = problem
    if entries and found.checkpoint is None:
        raise CheckpointError(f"All checkpoints in {catalog.root} are damaged: {list_damaged(found.damaged)}.")
    if ranks.rank == 0 and found.checkpoint is not None:
        tell_choice(found.checkpoint, found.damaged, entries, logger)
    return found


def _try(folder: Path, verify: Verify, ranks: Ranks) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint whose files are whole; or None, and what is wrong. Call on every rank."""

    def read(_: Any) -> tuple[str, str]:
        try:
            text = read_manifest_text(folder)
            parse_manifest(text)
            return text, ""
        except NewerFormatError:
            raise
        except CheckpointError as ex:
            return "", str(ex)

    text, problem = ranks.do(_nothing, read, f"{folder} cannot be loaded")
    if problem:
        return None, problem
    manifest = parse_manifest(text)  # rank 0's text, so that no rank sees another checkpoint
    paths = list(manifest.files)
    parts = split_by_bytes([manifest.files[path].num_bytes for path in paths], ranks.world_size)
    mine = {path: manifest.files[path] for path, part in zip(paths, parts, strict=True) if part == ranks.rank}
    problems: list[str] = ranks.do(lambda: find_problems(folder, mine, verify), _join, f"{folder} cannot be verified")
    return (None, "; ".join(problems[:3])) if problems else (manifest, "")


def tell_choice(
    checkpoint: Checkpoint, damaged: Mapping[Path, str], entries: Sequence[Entry], logger: logging.Logger
) -> None:
    """Say what the user may not expect of the choice.

    Args:
        checkpoint: The one that was chosen.
        damaged: What is wrong with those that were passed over.
        entries: All of the folder.
        logger: Hears it.
    """
    root, name, manifest = checkpoint.folder.parent, checkpoint.folder.name, checkpoint.manifest
    if damaged:
        logger.warning(f"Damaged checkpoints in {root}: {list_damaged(damaged)}. Loading {name}.")
    newer = [e.folder.name for e in entries if e.info and e.info.seq > manifest.seq and e.folder not in damaged]
    if not manifest.health:
        logger.warning(f"{root} has no healthy checkpoint: loading {name}, whose parameters are not all finite.")
    elif newer:
        logger.warning(
            f"{root}: the parameters in {', '.join(newer)} are not all finite. Loading {name}, the newest healthy one."
        )


def list_damaged(damaged: Mapping[Path, str]) -> str:
    """Damaged checkpoints, each with what is wrong with it, as a part of a sentence."""
    return "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged.items())


def _join(parts: Sequence[Sequence[str]]) -> list[str]:
    return [item for part in parts for item in part]


def _nothing(*_: Any) -> None:
    return None
