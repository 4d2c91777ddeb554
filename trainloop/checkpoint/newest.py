"""Finds the newest checkpoint of several folders, for a run with several `CheckpointingHook`s."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from ..errors import CheckpointError
from .agreement import Ranks
from .format.layout import ManifestInfo
from .format.verification import Verify
from .load.reader import Checkpoint
from .store import CheckpointStore

_NEVER = (False, -math.inf, -1)


def find_newest(
    stores: Sequence[tuple[CheckpointStore, Verify]], logger: logging.Logger
) -> tuple[CheckpointStore, Checkpoint] | None:
    """Find the newest healthy checkpoint of all folders; if none is healthy, the newest. Call on every rank.

    Args:
        stores: The folders, each with its level of verification. A folder is verified only if it may have the newest.
        logger: For warnings about folders in which no checkpoint can be read.

    Returns:
        The folder's store and the checkpoint. None: there is no checkpoint.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged. Or a newer trainloop has written one.
    """
    if not stores:
        return None
    if len(stores) == 1:
        checkpoint = stores[0][0].resolve("latest", stores[0][1])
        return (stores[0][0], checkpoint) if checkpoint is not None else None
    ranks = Ranks()
    newest = ranks.do(
        lambda: None,
        lambda _: [max(map(_rank_of, store.checkpoints()), default=_NEVER) for store, _ in stores],
        "Cannot load the latest checkpoint",
    )
    found: tuple[CheckpointStore, Checkpoint] | None = None
    best, problems = _NEVER, []
    for i in sorted(range(len(stores)), key=lambda i: newest[i], reverse=True):
        store, verify = stores[i]
        if found is not None and newest[i] <= best:
            continue
        try:
            checkpoint = store.resolve("latest", verify)
        except CheckpointError as ex:  # raised on every rank; another folder may have a good one
            problems.append(ex)
            continue
        if checkpoint is not None and (found is None or _rank_of(checkpoint.manifest) > best):
            found, best = (store, checkpoint), _rank_of(checkpoint.manifest)
    if found is None and problems:
        raise problems[0]
    if found is not None and ranks.rank == 0:
        for problem in problems:
            logger.warning(f"{problem} Loading {found[1].folder}.")
    return found


def _rank_of(info: ManifestInfo) -> tuple[bool, float, int]:
    """The sort key of checkpoints from several folders. Each folder counts its own commits, so the time decides. A run
    uses one clock for all its folders.
    """
    return info.health, info.time, info.step
