"""Finds the checkpoint to load. All ranks verify it together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..agreement import Ranks
from ..best import Best, choose_best
from ..format.catalog import Catalog, Entry, check_own, is_there, read_texts
from ..format.layout import LATEST, Manifest, NewerFormatError, parse_manifest, step_name
from ..format.verification import Verify, find_problems
from ..sharding import split_by_bytes
from .reader import Checkpoint, RemovedError

_PATIENCE = 3
"""How often a search starts again because the run that owns the folder removed the checkpoint during verification."""


@dataclass
class Found:
    """The result of a search."""

    checkpoint: Checkpoint | None
    damaged: dict[Path, str] = field(default_factory=dict)
    """The checkpoints that were tried before, and the problem with each."""


def find_explicit(catalog: Catalog, which: int | str | Path, verify: Verify) -> Found:
    """Find the checkpoint of a step or path. Call on every rank.

    Raises:
        RemovedError: Its run has removed it during verification.
        CheckpointError: It doesn't exist, or is damaged.
    """
    ranks = Ranks()
    for _ in range(_PATIENCE if is_link_to_latest(which) else 1):
        folder = ranks.do(_nothing, lambda _: catalog.explicit(which), "Cannot load the checkpoint")
        tried = _try(folder, verify, ranks)
        if tried.manifest is not None:
            return Found(Checkpoint(folder, tried.manifest))
        if not tried.is_gone:
            raise CheckpointError(
                f"{folder} is damaged: {tried.problem}. It was asked for by name, so no other is loaded."
            )
    raise RemovedError(f"{folder} was removed or saved again while it was verified, by its run. Try again.")


def find_best(catalog: Catalog, best: Best, verify: Verify, logger: logging.Logger) -> Found:
    """Find the checkpoint with the best value of a metric. Call on every rank.

    Raises:
        RemovedError: The run removes its checkpoints faster than they can be verified.
        CheckpointError: No checkpoint has the metric, or the best one is damaged. Then no other is loaded.
    """
    ranks = Ranks()
    for _ in range(_PATIENCE):
        folder, reason = ranks.do(
            _nothing, lambda _: locate_best(catalog, best, logger), "Cannot load the best checkpoint"
        )
        tried = _try(folder, verify, ranks)
        if tried.manifest is not None:
            if ranks.rank == 0:
                logger.info(f"{folder} is the best checkpoint: {reason}.")
            return Found(Checkpoint(folder, tried.manifest))
        if not tried.is_gone:
            raise CheckpointError(
                f"{folder} is the best checkpoint ({reason}), but it is damaged: {tried.problem}. No other is loaded in"
                " its place. Name another one by its step."
            )
    raise RemovedError(f"{catalog.root} loses its checkpoints to its run faster than they can be verified.")


def locate_best(catalog: Catalog, best: Best, logger: logging.Logger) -> tuple[Path, str]:
    """The folder of the best checkpoint, judging by the manifests, and why it is the best. Call on rank 0.

    Raises:
        CheckpointError: No checkpoint has the metric.
    """
    entries = catalog.entries()
    info, reason = choose_best(catalog.root, [entry.info for entry in entries if entry.info is not None], best)
    unreadable = {entry.folder: entry.problem for entry in entries if entry.info is None}
    if unreadable:
        logger.warning(
            f"{catalog.root}: these checkpoints are damaged, so nobody can tell whether one of them is better:"
            f" {list_damaged(unreadable)}."
        )
    return catalog.root / step_name(info.step), reason


def is_link_to_latest(which: int | str | Path) -> bool:
    """Whether a path is the link that a run points to its newest checkpoint. The link moves."""
    return isinstance(which, str | Path) and which != "latest" and Path(which).name == LATEST


def find_latest(catalog: Catalog, verify: Verify, logger: logging.Logger) -> Found:
    """Find the newest healthy checkpoint that is intact; if none is healthy, the newest. Call on every rank. It skips
    checkpoints that their run removes in the meantime.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged.
    """
    ranks = Ranks()
    for _ in range(_PATIENCE):
        entries: list[Entry] = ranks.do(_nothing, lambda _: catalog.latest(), "Cannot load the latest checkpoint")
        found = Found(None, {entry.folder: entry.problem for entry in entries if entry.info is None})
        has_lost = False
        for entry in entries:
            if entry.info is not None:
                tried = _try(entry.folder, verify, ranks)
                if tried.manifest is not None:
                    found.checkpoint = Checkpoint(entry.folder, tried.manifest)
                    if ranks.rank == 0:
                        tell_choice(found.checkpoint, found.damaged, entries, logger)
                    return found
                if tried.is_gone:
                    has_lost = True
                else:
                    found.damaged[entry.folder] = tried.problem
        if not has_lost:
            break
    if entries and has_lost:
        raise RemovedError(f"{catalog.root} loses its checkpoints to its run faster than they can be verified.")
    if entries:
        raise CheckpointError(f"All checkpoints in {catalog.root} are damaged: {list_damaged(found.damaged)}.")
    return found


@dataclass
class _Tried:
    """The result of an attempt to load one checkpoint."""

    manifest: Manifest | None
    problem: str = ""
    is_gone: bool = False
    """Whether its run has removed it, or saved its step again, in the meantime."""


def _try(folder: Path, verify: Verify, ranks: Ranks) -> _Tried:
    """Read a checkpoint's manifest and verify its files. Call on every rank."""
    own: list[Manifest] = []

    def read(_: Any) -> tuple[tuple[str, str], str, bool]:
        try:
            manifest, texts = read_texts(folder)
            check_own(folder, manifest)
            own.append(manifest)
            return texts, "", False
        except NewerFormatError:
            raise
        except CheckpointError as ex:
            return ("", ""), str(ex), not folder.exists()

    texts, problem, is_gone = ranks.do(_nothing, read, f"{folder} cannot be loaded")
    if problem:
        return _Tried(None, problem, is_gone)
    manifest = own[0] if own else parse_manifest(*texts)  # rank 0's text, so that all ranks see the same checkpoint
    paths = list(manifest.files)
    parts = split_by_bytes([manifest.files[path].num_bytes for path in paths], ranks.world_size)
    mine = [path for path, part in zip(paths, parts, strict=True) if part == ranks.rank]

    def decide(problems: Sequence[Sequence[str]]) -> tuple[list[str], bool]:
        all_problems = [problem for part in problems for problem in part]
        return all_problems, not is_there(folder, manifest.seal)

    problems, is_gone = ranks.do(
        lambda: find_problems(folder, manifest, mine, verify), decide, f"{folder} cannot be verified"
    )
    return _Tried(None if problems or is_gone else manifest, "; ".join(problems[:3]), is_gone)


def tell_choice(
    checkpoint: Checkpoint, damaged: Mapping[Path, str], entries: Sequence[Entry], logger: logging.Logger
) -> None:
    """Log what the user may not expect about the chosen checkpoint.

    Args:
        checkpoint: The chosen one.
        damaged: The skipped ones, and the problem with each.
        entries: All entries of the folder.
        logger: The logger.
    """
    root, name, manifest = checkpoint.folder.parent, checkpoint.folder.name, checkpoint.manifest
    if damaged:
        logger.warning(f"Damaged checkpoints in {root}: {list_damaged(damaged)}. Loading {name}.")
    newer = [e.folder.name for e in entries if e.info and e.info.seq > manifest.seq and e.folder not in damaged]
    if not manifest.health:
        logger.warning(f"{root} has no healthy checkpoint. Loading {name}: not all of its parameters are finite.")
    elif newer:
        logger.warning(
            f"{root}: the parameters in {', '.join(newer)} are not all finite. Loading {name}, the newest healthy one."
        )


def list_damaged(damaged: Mapping[Path, str]) -> str:
    """Damaged checkpoints, each with its problem, as a part of a sentence."""
    return "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged.items())


def _nothing(*_: Any) -> None:
    return None
