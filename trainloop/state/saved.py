"""The state of a run in the form of a checkpoint: sorted by how it is stored, and read back into the live model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Checkpoint, Content
from ..errors import CheckpointError
from ..ranks import collectives
from ..step.non_finite import clean_name
from .live import empty_like_param

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_OURS = {"model", "training_state", "rank"}
_FOLDERS = {"optim", "state"}
"""Names in a checkpoint that no hook's weights can have."""


def content_of(trainer: BaseTrainer, run_id: str) -> Content:
    """The trainer's state, sorted by how it is stored. Call on every rank.

    A hook's value that is a flat dict of tensors, as an average of the weights is, becomes a folder of its own.
    """
    state_dict = trainer.live_state_dict()
    training_state = dict(state_dict["training_state"])
    optimizer = training_state.pop("optimizer")
    shards: dict[str, torch.Tensor] = {}
    other: dict[str, dict[str, Any]] = {}
    for name, state in optimizer["state"].items():
        other[name] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                shards[f"{name}/{key}"] = value
            else:
                other[name][key] = value
    weights = {"model": state_dict["model"]}
    hooks: dict[str, Any] = {}
    for key, value in state_dict.items():
        if key not in _OURS:
            (weights if key.isidentifier() and key not in _FOLDERS and _is_weights(value) else hooks)[key] = value
    return Content(
        weights=weights,
        shards={"optim": shards},
        global_state={
            **training_state,
            "run_id": run_id,
            "optimizer": {"state": other, "param_groups": optimizer["param_groups"]},
            "hooks": hooks,
        },
        must_be_finite={f"model/{name}" for name in trainer.named_parameters()},
        of_rank_zero={clean_name(name) for name, _ in trainer.unwrapped_model.named_buffers()},
        rank_state={**state_dict["rank"], "buffers": _buffers(trainer)},
    )


def read_state(trainer: BaseTrainer, checkpoint: Checkpoint) -> dict[str, Any]:
    """The inverse of `content_of`: weights are read into the live model, the rest is returned. Call on every rank.

    Raises:
        CheckpointError: The checkpoint is not of this model; nothing was changed.
    """
    params = trainer.named_parameters()
    training_state = dict(checkpoint.global_state())
    hooks = training_state.pop("hooks")
    training_state.pop("run_id")
    saved_optimizer = training_state["optimizer"]
    groups = {name: group for group in saved_optimizer["param_groups"] for name in group["params"]}
    optim: dict[str, torch.Tensor] = {}
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in saved_optimizer["state"].items()}
    for full_name, (shape, dtype) in checkpoint.tensors("optim").items():
        name, key = full_name.rsplit("/", 1)
        if name not in params:
            raise CheckpointError(f"{checkpoint.folder} holds optimizer state of {name}, which the model has not.")
        group = groups[name]
        on_host = not shape and not (group.get("fused") or group.get("capturable"))
        optim[full_name] = state[name][key] = empty_like_param(params[name], shape, dtype, on_host=on_host)
    live = trainer.live_model_state()
    checkpoint.read_into("model", live)  # checks all names and shapes before it writes
    checkpoint.read_into("optim", optim)
    for group_name, tensors in checkpoint.manifest.tensors.items():
        if group_name in ("model", "optim"):
            continue
        averages = {
            name: empty_like_param(params.get(name), tuple(record.shape), getattr(torch, record.dtype), on_host=False)
            for name, record in tensors.items()
        }
        checkpoint.read_into(group_name, averages)
        hooks[group_name] = averages
    training_state["optimizer"] = {"state": state, "param_groups": saved_optimizer["param_groups"]}
    state_dict = {"model": live, "training_state": training_state, **hooks}
    rank_state = checkpoint.rank_state(collectives.rank())
    if rank_state is not None:
        own = _buffers(trainer)
        for name, buffer in rank_state.pop("buffers").items():
            if name in own and own[name].shape == buffer.shape:  # else a cache that has grown, or is gone
                own[name].copy_(buffer)
        state_dict["rank"] = rank_state
    return state_dict


def _buffers(trainer: BaseTrainer) -> dict[str, torch.Tensor]:
    """Each rank's own: BatchNorm's statistics are of the rank's data, and under FSDP2 nobody makes them equal. Of a
    single process those that are not among the model's tensors, because they are not persistent.
    """
    model = trainer.unwrapped_model
    kept = model.state_dict().keys() if collectives.world_size() == 1 else ()
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name not in kept}


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())
