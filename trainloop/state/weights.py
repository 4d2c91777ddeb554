"""Loads weights without the rest of a run, for `BaseTrainer.load_weights`: to evaluate, to predict, to sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint import Checkpoint, CheckpointStore
from ..checkpoint.agreement import Ranks
from ..checkpoint.best import parse_best
from ..checkpoint.format.catalog import Catalog
from ..checkpoint.format.foreign import has_manifest, is_importable
from ..checkpoint.sharding import local_tensor
from ..errors import CheckpointError, describe
from ..paths import parse_absolute_path
from ..ranks import collectives
from .adoption import adopt_weights
from .frozen import check_left_out
from .hook_state import HOOK_SHARDS
from .live import empty_like_param
from .modules import load_made_entries, load_rank_buffers
from .saved import read_model
from .training import AVERAGED

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


def load_weights(trainer: BaseTrainer, which: int | str | Path, ema: str | None) -> Path:
    """Read the weights of a checkpoint into the model of a trainer that is built. Call on every rank.

    Returns:
        The path of what was loaded: a folder, or a file of weights.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `which` is "best:" without a metric.
        RuntimeError: `train` is running.
        CheckpointError: On every rank. It cannot be read, or belongs to another model. Or `which` needs the folder of a
            `CheckpointingHook`, and there is none.
    """
    if isinstance(which, bool) or not isinstance(which, int | str | Path):
        raise TypeError(f'`which` must be a step, a path, "latest" or "best", but is {describe(which)}.')
    if ema is not None and not isinstance(ema, str):
        raise TypeError(f"`ema` must be the name of an EmaHook or None, but is {describe(ema)}.")
    parse_best(which)  # raises before a rank waits for another
    if trainer._feed.is_started:
        raise RuntimeError(
            "`load_weights` was called while `train` runs, which would train on with other weights. Call it before or"
            " after `train`."
        )
    place = Ranks().do(lambda: None, lambda _: _locate(trainer, which), "Cannot load the weights")
    collectives.reshard(trainer.model)  # otherwise FSDP2 would go on using gathered weights
    found = _load(trainer, *place, ema)
    trainer._weights_from = str(found)
    trainer.logger.info(f"Loaded {f'the average {ema!r}' if ema is not None else 'the weights'} of {found}.")
    return found


def _locate(trainer: BaseTrainer, which: int | str | Path) -> tuple[Path | None, int | str | Path]:
    """A folder of checkpoints and which one to load; or None and the path of another tool's. Call on rank 0."""
    if isinstance(which, int) or which == "latest" or parse_best(which) is not None:
        folders = [hook.saves_to(trainer) for hook in trainer.checkpointers]
        folder = next((folder for folder in folders if folder is not None), None)
        if folder is None:
            raise CheckpointError(
                f"{which!r} names a checkpoint of this run, but `build_hooks` returns no CheckpointingHook that says"
                " where they are. Return it, or give a path"
            )
        return folder, which
    path = parse_absolute_path("which", which)
    if is_importable(path):
        return None, path
    if not has_manifest(path) and Catalog(path).entries():
        return path, "latest"
    return path.parent, path


def _load(trainer: BaseTrainer, folder: Path | None, which: int | str | Path, ema: str | None) -> Path:
    if folder is None:
        path = Path(str(which))
        adopt_weights(trainer, path, ema)
        return path
    checkpoint = CheckpointStore(folder, logger=trainer.logger).resolve(which)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint, so no weights were loaded.")
    check_left_out(trainer, checkpoint)
    Ranks().do(lambda: _read(trainer, checkpoint, ema), lambda _: None, "Cannot load the weights")
    return checkpoint.folder


def _read(trainer: BaseTrainer, checkpoint: Checkpoint, ema: str | None) -> None:
    groups = checkpoint.manifest.tensors
    averages = [group for group in groups if group not in ("model", "optim", HOOK_SHARDS)]
    if ema is not None and ema not in averages:
        raise CheckpointError(
            f"{checkpoint.folder} has no average {ema!r}. Its averages: {', '.join(averages) or 'none'}"
        )
    state, first = checkpoint.global_state(), checkpoint.saved_rank_state(0)
    read_model(trainer, checkpoint, state.get("changed_buffers", {}))
    load_rank_buffers(trainer, first, state["seed"])  # rank 0's, as in an evaluation
    load_made_entries(trainer.unwrapped_model, first.get("extra_state", {}))
    if ema is None and AVERAGED in averages:
        ema = AVERAGED  # the weights that a schedule-free optimizer trains are not the ones to evaluate
    if ema is not None:
        _read_average(trainer, checkpoint, ema)


@torch.no_grad()
def _read_average(trainer: BaseTrainer, checkpoint: Checkpoint, group: str) -> None:
    """Copy an average into the parameters. Its dtype may be wider than theirs."""
    params = trainer.named_parameters()
    averages = {
        name: empty_like_param(params.get(name), shape, dtype, on_host=name not in params)
        for name, (shape, dtype) in checkpoint.tensors(group).items()
    }
    checkpoint.read_into(group, averages)
    for name in params.keys() & averages.keys():
        local_tensor(params[name].detach()).copy_(local_tensor(averages[name]))
