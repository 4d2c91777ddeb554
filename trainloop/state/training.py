"""The whole state of a run as one nested dict, as `BaseTrainer.state_dict` returns it, and its restoration."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed

from ..checkpoint import Checkpoint
from ..checkpoint.agreement import Ranks
from ..checkpoint.load.reader import RemovedError
from ..errors import CheckpointError
from ..ranks import collectives
from ..rng import derived_seed, load_rng_state, rng_state
from .frozen import check_left_out
from .modules import (
    changed_forms,
    extra_state,
    load_made_entries,
    load_rank_buffers,
    new_buffers,
    place_buffers,
    rank_buffers,
)
from .optimizer import load_optimizer_state, optimizer_state
from .resuming import ScriptHyperparameters, check_schedule_length, script_wins, settings_in_force, tell_differences
from .saved import read_state
from .settings import run_settings

if TYPE_CHECKING:
    from ..hook import BaseHook
    from ..trainer import BaseTrainer


AVERAGED = "averaged"
"""Key, in a state and in a checkpoint, of the averaged weights of a schedule-free optimizer."""


def run_state(trainer: BaseTrainer, model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state of the run, with the given tensors of the model and the hooks' part. Call on every rank."""
    scheduler, scaler = trainer.lr_scheduler, trainer.grad_scaler
    state_dict: dict[str, Any] = {
        "model": model,
        "training_state": {
            "step": trainer.step,
            "epoch": trainer.epoch,
            "seed": trainer.seed,
            "optimizer": optimizer_state(trainer.unwrapped_model, trainer._raw_optimizer),
            "lr_scheduler": scheduler.state_dict() if scheduler is not None else None,
            "grad_scaler": scaler.state_dict() if scaler is not None else None,
            "data": trainer._feed.state_dict(),
            "changed_buffers": changed_forms(trainer),
            "trainable": trainer._trainable.state_dict(),
        },
        "rank": {
            "rng": rng_state(trainer.device),
            "data": trainer._feed.rank_state_dict(),
            "extra_state": extra_state(trainer.unwrapped_model),
            **rank_buffers(trainer),
        },
    }
    with trainer._window.modes.averaged() as is_averaged:
        if is_averaged:  # these are the weights to evaluate and to export; "model" has those to train
            state_dict[AVERAGED] = {
                name: tensor.detach().clone() for name, tensor in trainer.live_model_state().items()
            }
    _add_hooks(trainer, state_dict)
    return state_dict


def load_whole_state(trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
    """Restore what `BaseTrainer.state_dict` returned, also while `train` runs. Call on every rank.

    Raises:
        RuntimeError: A step is under way.
        ValueError: The state belongs to another model or optimizer.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    model, is_running = trainer.unwrapped_model, trainer._feed.is_started
    if is_running and trainer._window.is_in_step:
        raise RuntimeError(
            f"`load_state_dict` was called in the middle of step {trainer.step}, which would mix two states. Call it in"
            " a hook's `on_after_step`, or before or after `train`."
        )
    saved = state_dict["model"]
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()}
    changed = new_buffers(trainer, state_dict["training_state"].get("changed_buffers", {}), described)
    if is_running:
        trainer._feed.close()  # otherwise it would continue at its old position
    place_buffers(model, changed, is_persistent=True)
    load_run_state(trainer, state_dict)
    collectives.reshard(trainer.model)
    set_model_state_dict(model, {**extra_state(model), **saved}, options=trainer.state_dict_options)
    for hook in trainer.hooks:
        hook.on_load_state_dict(trainer, state_dict)
    trainer._weights_from = ""
    if is_running:
        start_data(trainer)


def start_data(trainer: BaseTrainer) -> None:
    """Create the iterator over the training data, then load the saved state of the random generators, because creating
    an iterator may draw from them.
    """
    trainer._feed.start()
    if trainer._restored_rng is not None:
        load_rng_state(trainer._restored_rng, trainer.device)
        trainer._restored_rng = None


def _add_hooks(trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
    """Let every hook add its state.

    Raises:
        ValueError: A hook has overwritten an entry of another hook.
    """
    owners: dict[tuple[str, str], BaseHook] = {}
    for hook in trainer.hooks:
        before = _entries(state_dict)
        hook.on_state_dict(trainer, state_dict)
        for place, value in _entries(state_dict).items():
            if place not in before or before[place] is not value:
                other = owners.setdefault(place, hook)
                if other is not hook:
                    raise ValueError(
                        f"{type(hook).__name__}.on_state_dict has overwritten {place[1]!r}, which"
                        f" {type(other).__name__}.on_state_dict had added. Give each hook a key of its own."
                    )


def _entries(state_dict: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """The values by place: those of the run, and those of this rank."""
    run = {("run", key): value for key, value in state_dict.items() if key != "rank"}
    return {**run, **{("rank", key): value for key, value in state_dict["rank"].items()}}


def load_run_state(
    trainer: BaseTrainer, state_dict: dict[str, Any], script_wins: Collection[str] = (), *, copy: bool = True
) -> None:
    """Restore everything but the model, which a resume reads in place, and the hooks' part. Call on every rank.

    Args:
        trainer: The trainer. It must be built.
        state_dict: As for `BaseTrainer.load_state_dict`; `"model"` is ignored. Without `"rank"`, the random generators
            are derived from seed, step and rank.
        script_wins: Names from `resuming.ON_RESUME` that are not restored.
        copy: False: the optimizer uses the tensors of the state themselves, so they are in memory only once.

    Raises:
        ValueError: The state belongs to another optimizer, schedule, scaler or data.
    """
    state, rank_state = state_dict["training_state"], state_dict.get("rank")
    scheduler, scaler = trainer.lr_scheduler, trainer.grad_scaler
    for name, own in (("lr_scheduler", scheduler), ("grad_scaler", scaler)):
        if (state[name] is None) != (own is None) and name not in script_wins:
            has, had = ("no", "one") if own is None else ("one", "none")
            raise ValueError(f"`build_{name}` gives this run {has} {name}, but the saved one had {had}.")
    own_state = rank_state if rank_state is not None else state_dict.get("first_rank")
    if own_state is not None:
        load_rank_buffers(trainer, own_state, state["seed"])
        load_made_entries(trainer.unwrapped_model, own_state.get("extra_state", {}))
    trainer._trainable.load_state_dict(state.get("trainable"))
    script = ScriptHyperparameters(trainer)
    if "optimizer" not in script_wins:
        load_optimizer_state(trainer.unwrapped_model, trainer._raw_optimizer, state["optimizer"], copy=copy)
    if scheduler is not None and "lr_scheduler" not in script_wins:
        scheduler.load_state_dict(state["lr_scheduler"])
    if scaler is not None:
        scaler.load_state_dict(state["grad_scaler"])
    trainer.step, trainer.seed = state["step"], state["seed"]
    script.put_back(script_wins)
    trainer._window.is_updating = False
    trainer.epoch = 0
    if "data" not in script_wins:
        trainer._feed.load_state_dict(state["data"], rank_state["data"] if rank_state is not None else None)
        trainer.epoch = state.get("epoch", state["data"]["epoch"])  # earlier versions saved only the data's epoch
    trainer._length.update(trainer.step)
    if rank_state is None:
        set_seed(derived_seed(state["seed"], trainer.step, trainer.accelerator.process_index))
    else:
        trainer._restored_rng = rank_state["rng"]  # loaded again after the data's iterator was created
        load_rng_state(rank_state["rng"], trainer.device)


def restore_run(trainer: BaseTrainer) -> None:
    """Begin a `train`: restore the run from a checkpoint if this is the first one, and call the hooks'
    `on_before_train`. Call on every rank.

    The trainer's state is restored before any hook is called. Each hook gets its own state right after the call.
    """
    trainer.peers.enter("restoring the run")
    if trainer._weights_from:
        raise RuntimeError(
            f"`load_weights` has loaded {trainer._weights_from}, without the optimizer's state and the position in the"
            " data, so the run cannot train. To train from a checkpoint, make a new trainer and name the checkpoint in"
            " `CheckpointingHook(load=...)`."
        )
    state_dict = None
    if not trainer._is_restored:
        if trainer.checkpointers and not trainer.settings:  # not again after a `train` that failed here
            trainer.settings = run_settings(trainer)
        state_dict = next(filter(None, (hook.restore(trainer) for hook in trainer.checkpointers)), None)
    if state_dict is not None:
        trainer._initial_weights.drop()
    trainer._initial_weights.fill()
    trainer._length.update(trainer.step)
    check_schedule_length(trainer)
    if trainer._length.is_reached and trainer.step > 0 and not trainer.control.agreed["stop"]:
        trainer.logger.info(
            f"The run is complete: it has reached step {trainer.step}, and {trainer._length}. To continue, raise"
            f" {trainer._length.names}."
        )
    for hook in trainer.hooks:
        hook.on_before_train(trainer)
        if state_dict is not None:
            hook.on_load_state_dict(trainer, state_dict)
    trainer._is_restored = True  # last, so that the next `train` tries again if something has failed


def resume(trainer: BaseTrainer, checkpoint: Checkpoint, on_resume: Collection[str]) -> dict[str, Any]:
    """Load a checkpoint into a trainer that is built, and log which settings differ. Call on every rank.

    Args:
        trainer: The trainer.
        checkpoint: A checkpoint of trainloop.
        on_resume: Names from `resuming.ON_RESUME` of what the script overrides.

    Returns:
        The state for the hooks' `on_load_state_dict`.

    Raises:
        RemovedError: On every rank. The checkpoint's run has removed it in the meantime. Another one can be read.
        CheckpointError: On every rank. Some rank cannot read it, or it belongs to another model.
        ValueError: Its optimizer, schedule or data does not fit this run.
    """
    asked, saved = trainer.settings, checkpoint.manifest.settings
    try:
        wins = script_wins(on_resume, asked, saved, checkpoint.folder)
        check_left_out(trainer, checkpoint)
        state_dict = _read_together(trainer, checkpoint)
        load_run_state(trainer, state_dict, wins, copy=False)
    except (AttributeError, IndexError, KeyError, TypeError) as ex:  # state that no run can have saved
        raise CheckpointError(
            f"{checkpoint.folder} holds state that no run has saved ({type(ex).__name__}: {ex}). Load another one."
        ) from ex
    trainer.settings = settings_in_force(asked, saved, wins)
    trainer.logger.info(f"Resumed from {checkpoint.folder}. The run continues after step {trainer.step}.")
    tell_differences(trainer, asked, checkpoint.manifest, wins)
    if state_dict.get("rank") is None:
        trainer.logger.warning(
            f"The checkpoint was saved by {checkpoint.manifest.world_size} processes, and this run has"
            f" {collectives.world_size()}. Model, optimizer and data continue exactly. The random generators of each"
            " rank are seeded anew."
        )
    return state_dict


def _read_together(trainer: BaseTrainer, checkpoint: Checkpoint) -> dict[str, Any]:
    """Call `read_state`. The ranks then vote, so that all raise the error of any one of them."""
    state_dict: dict[str, Any] = {}

    def read() -> str:
        try:
            state_dict.update(read_state(trainer, checkpoint))
        except RemovedError as ex:
            return str(ex)
        return ""

    removed: list[str] = Ranks().do(read, lambda told: list(filter(None, told)), "Cannot load the checkpoint")
    if removed:
        raise RemovedError(removed[0])
    return state_dict
