"""Chooses the state that a run starts from, and restores it. All ranks succeed, or all raise the same error."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint, CheckpointStore
from ..checkpoint.format.foreign import is_importable
from ..checkpoint.format.verification import Verify
from ..checkpoint.load.loading import is_link_to_latest
from ..checkpoint.load.reader import RemovedError
from ..checkpoint.newest import find_newest
from ..ranks import collectives
from .adoption import adopt
from .resuming import stays_stopped
from .training import resume

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


@dataclass(frozen=True)
class Source:
    """A folder of checkpoints that the run saves into."""

    store: CheckpointStore
    load: str | int | Path | None
    """The checkpoint to load: "latest", "best:METRIC", a step of this folder, a path, or None for nothing."""
    verify: Verify
    on_resume: Collection[str] = ()
    """Names of what the script overrides in the checkpoint."""


@dataclass(frozen=True)
class Restored:
    """The state that a run starts from."""

    run_id: str
    state_dict: dict[str, Any] | None = None
    """The state for the hooks. None: the run starts fresh."""
    store: CheckpointStore | None = None
    """The store that has the checkpoint, or whose `load` named it."""


def restore_from(trainer: BaseTrainer, sources: Sequence[Source]) -> Restored:
    """Restore a run: from the requested step, path or best checkpoint, else from the newest healthy checkpoint of all
    folders with "latest". Call on every rank.

    Raises:
        CheckpointError: On every rank. It cannot be loaded.
        ValueError: Several sources request a certain checkpoint.
    """
    if trainer.dry_run:  # the scratch folder has no checkpoint, so load only a path
        sources = [source if isinstance(source.load, Path) else replace(source, load=None) for source in sources]
    explicit = [source for source in sources if source.load not in (None, "latest")]
    if len(explicit) > 1:
        raise ValueError(
            "`load` must name a step or a path in one CheckpointingHook only, but it is"
            f" {' and '.join(repr(source.load) for source in explicit)}. Pass load=None to the others."
        )
    if explicit:
        return _restore_explicit(trainer, explicit[0])
    looking = [(source.store, source.verify) for source in sources if source.load == "latest"]
    found = find_newest(looking, trainer.logger)
    if found is None:
        paths = ", ".join(str(source.store.path) for source in sources)
        trainer.logger.info(f"No checkpoint is loaded from {paths}. The run starts at step 0.")
        return Restored(_new_run_id())
    store, checkpoint = found
    return _resume(trainer, next(source for source in sources if source.store is store), checkpoint)


def _resume(trainer: BaseTrainer, source: Source, checkpoint: Checkpoint) -> Restored:
    state_dict = resume(trainer, checkpoint, source.on_resume)
    is_own = checkpoint.folder.parent == source.store.path
    if is_own and stays_stopped(trainer, checkpoint.manifest, source.on_resume):
        trainer.control.agreed["stop"] = 1
    return Restored(checkpoint.manifest.run_id, state_dict, source.store)


def _restore_explicit(trainer: BaseTrainer, source: Source) -> Restored:
    assert source.load is not None
    if _is_foreign(source.load):
        path = Path(str(source.load))
        state_dict = adopt(trainer, path)
        own = source.store.checkpoints()
        if own:
            trainer.logger.warning(
                f"{source.store.path} has checkpoints up to step {max(info.step for info in own)}. They are"
                f' not loaded, because `load` names {path}. To continue from them, pass load="latest".'
            )
        return Restored(_new_run_id(), state_dict)
    may_try_again = is_link_to_latest(source.load)
    while True:
        checkpoint = source.store.resolve(source.load, source.verify)
        assert checkpoint is not None, "only the latest may be none"
        try:
            return _resume(trainer, source, checkpoint)
        except RemovedError:  # the link pointed to this checkpoint; now it points to the next one
            if not may_try_again:
                raise
            may_try_again = False


def _new_run_id() -> str:
    """A new id, the same on every rank. Call on every rank."""
    run_id: str = collectives.broadcast_object(uuid.uuid4().hex)
    return run_id


def _is_foreign(load: str | int | Path) -> bool:
    """Whether `load` is the path of another tool's checkpoint, as rank 0 sees it. Call on every rank."""
    if not isinstance(load, str | Path):
        return False
    is_foreign: bool = collectives.broadcast_object(is_importable(Path(load)))
    return is_foreign
