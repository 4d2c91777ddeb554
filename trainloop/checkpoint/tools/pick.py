"""Picks the checkpoint that a command reads, without a lock, and verifies only the files that are needed."""

from __future__ import annotations

import logging
from pathlib import Path

from ...errors import CheckpointError
from ..best import Best
from ..format.catalog import Catalog
from ..load.loading import list_damaged, locate_best, tell_choice
from ..load.reader import Checkpoint
from .survey import Select, is_one_checkpoint, look_into

_PATIENCE = 3  # how often a run may remove the checkpoint that is being verified


def pick(path: Path, step: int | None, select: Select, logger: logging.Logger, best: Best | None = None) -> Checkpoint:
    """Find a checkpoint, and verify every byte of the files that are needed.

    Args:
        path: A folder of checkpoints, or a checkpoint.
        step: The step. None: the newest healthy checkpoint with intact files; if none is healthy, the newest.
        select: Chooses the needed files.
        logger: For warnings about the choice.
        best: Requests the checkpoint with the best value of a metric.

    Raises:
        CheckpointError: There is no checkpoint, or the requested one is damaged.
        ValueError: Both a step and the best one are requested, or the best one of a single checkpoint.
    """
    catalog = Catalog(path)
    if best is not None:
        if step is not None or is_one_checkpoint(path):
            raise ValueError("--best chooses among the checkpoints of a folder: give the folder, and no --step")
        folder, reason = locate_best(catalog, best, logger)
        logger.info(f"{folder} is the best checkpoint: {reason}.")
        path = folder
    if step is not None or is_one_checkpoint(path):
        folder = catalog.explicit(path.resolve() if step is None else step)  # resolved, because the link may move
        seen = look_into(folder, "full", select)
        if seen is None:
            raise CheckpointError(f"{folder} was removed while it was verified, by its run")
        manifest, problems = seen
        if manifest is None or problems:
            raise CheckpointError(f"{folder} is damaged: {'; '.join(problems[:3])}")
        return Checkpoint(folder, manifest)
    for _ in range(_PATIENCE):
        entries = catalog.latest()
        damaged = {entry.folder: entry.problem for entry in entries if entry.info is None and entry.folder.exists()}
        for entry in entries:
            if entry.info is None:
                continue
            seen = look_into(entry.folder, "full", select)
            if seen is None:
                break  # its run has removed it, so there is a newer one
            manifest, problems = seen
            if manifest is not None and not problems:
                checkpoint = Checkpoint(entry.folder, manifest)
                tell_choice(checkpoint, damaged, entries, logger)
                return checkpoint
            damaged[entry.folder] = "; ".join(problems[:3])
        else:
            raise CheckpointError(
                f"All checkpoints in {path} are damaged: {list_damaged(damaged)}"
                if damaged
                else f"{path} has no checkpoint"
            )
    raise CheckpointError(
        f"{path} loses its checkpoints to its run faster than they can be verified. Give another step"
    )
