"""Frozen parameters that a checkpoint leaves out: finds them, and checks that a resumed run has built the same ones.

A parameter may be left out if it is frozen and still has the bits that `build_model` gave it. The manifest has its
name, shape, dtype and a fingerprint of its bits. A frozen parameter is saved like a trained one if `forward` has
changed it (for example a teacher that follows its student), or if it was loaded after the model was built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint import Checkpoint
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.format.dtypes import dtype_name
from ..checkpoint.format.tables import FrozenRecord
from ..errors import CheckpointError
from ..ranks import collectives
from ..step.built import frozen_entries, sums_of_held

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


def left_out(trainer: BaseTrainer, *, is_first: bool) -> dict[str, FrozenRecord]:
    """The frozen parameters that need not be saved, by clean name. Call on every rank.

    Costs a pass over the frozen parameters and, at the first save of a process, their fingerprints.

    Args:
        trainer: The trainer. One of its checkpointers is `trainable_only`.
        is_first: Whether to log which frozen parameters are saved.
    """
    built, entries = trainer._built_model, frozen_entries(trainer.unwrapped_model)
    sums = sums_of_held(entries)
    own = [name for name, value in sums.items() if built.frozen_sums.get(name) != value]
    changed = {name for names in collectives.gather_objects(own) for name in names}
    if changed and is_first:
        size = sum(tensor.nbytes for name, tensor in entries.items() if name in changed) / 2**20
        trainer.logger.info(
            f"{len(changed)} frozen parameters ({size:,.1f} MiB, first: {min(changed)}) differ from what"
            " `build_model` returned, so checkpoints include them."
        )
    kept = {name: tensor for name, tensor in entries.items() if name not in changed}
    new = [name for name in kept if name not in built.fingerprints]
    built.fingerprints.update(zip(new, fingerprints([kept[name] for name in new]), strict=True))
    return {
        name: FrozenRecord(dtype_name(tensor.dtype), tuple(tensor.shape), built.fingerprints[name])
        for name, tensor in kept.items()
    }


def check_left_out(trainer: BaseTrainer, checkpoint: Checkpoint) -> None:
    """Check that the model has the parameters that a checkpoint leaves out, bit for bit. Call on every rank, before
    anything is read into the model.

    Raises:
        CheckpointError: On every rank. It names the first parameter that differs.
    """
    records = checkpoint.manifest.frozen
    if not records:
        return
    trainer._initial_weights.fill()  # a frozen parameter of the saved run may be a trainable one here
    live = trainer.live_model_state()
    found = fingerprints([live.get(name) for name in records])
    differing = []
    for (name, record), fingerprint in zip(records.items(), found, strict=True):
        if name not in live:
            differing.append(f"{name}, which the model has not")
            continue
        form = (dtype_name(live[name].dtype), tuple(live[name].shape))
        if form != (record.dtype, record.shape):
            differing.append(
                f"{name}, which is {record.dtype} {list(record.shape)} there, but {form[0]} {list(form[1])} here"
            )
        elif fingerprint != record.fingerprint:
            differing.append(f"{name}, which has other values here")
    differing = collectives.broadcast_object(differing)
    if differing:
        raise CheckpointError(
            f"{checkpoint.folder} was saved with `trainable_only`, so `build_model` must give the frozen parameters"
            f" again, but {len(differing)} of {len(records)} differ. The first is {differing[0]}. Build the model from"
            " the same pretrained weights as the saved run; nothing was changed."
        )
    if not trainer._built_model.fingerprints:
        trainer._built_model.fingerprints.update(zip(records, found, strict=True))
