"""The state of a run in the form of a checkpoint: sorts it by how it is stored, and reads it into the live model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Checkpoint, Content
from ..checkpoint.content import is_dtensor
from ..errors import CheckpointError
from ..ranks import collectives
from ..step.buffers import memory_of, write_into
from ..step.built import buffer_slots
from .frozen import left_out
from .hook_state import HOOK_SHARDS, OF_HOOKS, join_hook_state, sort_hook_state
from .live import empty_like_param
from .modules import (
    check_complete,
    finite_names,
    load_made_entries,
    made_entries,
    new_buffers,
    place_buffers,
    shares_memory,
)
from .optimizer import check_unsharded

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_OURS = {"model", "training_state", "rank"}
_OF_MODEL = ("buffers", "built_sums", "extra_state")
"""The keys of a rank's state that belong to the model."""


def content_of(trainer: BaseTrainer, run_id: str, is_first: bool = False, trainable_only: bool = False) -> Content:
    """The trainer's state, sorted by how it is stored. Call on every rank.

    If a hook's value is a flat dict of tensors, for example an average of the weights, it becomes a separate folder.

    Args:
        trainer: The trainer.
        run_id: Identifies the run.
        is_first: Also check that the whole model could be restored.
        trainable_only: Leave out the frozen parameters that are as `build_model` gave them, also from averages.

    Raises:
        TypeError: The optimizer keeps state that cannot be stored.
        ValueError: The model's `state_dict` leaves out a trained parameter.
    """
    state_dict = trainer.live_state_dict()
    if is_first:
        check_complete(trainer, state_dict["model"])
    training_state = dict(state_dict["training_state"])
    optimizer = training_state.pop("optimizer")
    check_unsharded(trainer._raw_optimizer, {"other": optimizer["other"], **optimizer["own"]})
    shards, other, keys = _split(optimizer["state"])
    model = state_dict["model"]
    frozen = left_out(trainer, is_first=is_first) if trainable_only else {}
    weights = {"model": {name: tensor for name, tensor in model.items() if name not in frozen}}
    added = {key: value for key, value in state_dict.items() if key not in _OURS}
    hooks = sort_hook_state(trainer, added, model)
    for key, value in hooks.weights.items():
        weights[key] = {n: t for n, t in value.items() if n not in frozen or not shares_memory(t, model[n])}
    params, buffers = finite_names(trainer)
    trained = {name for name, param in trainer.named_parameters().items() if param.requires_grad}
    return Content(
        weights=weights,
        shards={"optim": shards, **({HOOK_SHARDS: hooks.shards} if hooks.shards else {})},
        global_state={
            **training_state,
            "run_id": run_id,
            "optimizer": {**optimizer, "state": other, "keys": keys},
            "hooks": hooks.of_run,
        },
        must_be_finite={
            *(f"model/{name}" for name in params | buffers),
            *(f"{group}/{name}" for group in weights for name in trained if group != "model"),
            *(f"optim/{name}" for name in shards),
            *(f"state/buffers/{name}" for name in buffers),
        },
        of_rank_zero=buffer_slots(trainer.unwrapped_model).keys(),
        frozen=frozen,
        rank_state={**state_dict["rank"], **({OF_HOOKS: hooks.of_rank} if hooks.of_rank else {})},
    )


def read_state(trainer: BaseTrainer, checkpoint: Checkpoint) -> dict[str, Any]:
    """The inverse of `content_of`. Reads weights into the live model, and returns the rest. Call on every rank.

    Raises:
        CheckpointError: The checkpoint belongs to another model; nothing was changed.
    """
    params = trainer.named_parameters()
    training_state = dict(checkpoint.global_state())
    hooks = join_hook_state(trainer, checkpoint, training_state.pop("hooks"))
    training_state.pop("run_id")
    optimizer = training_state["optimizer"] = dict(training_state["optimizer"])
    keys = optimizer.pop("keys", {})
    groups = {name: group for group in optimizer["param_groups"] for name in group["params"]}
    optim: dict[str, torch.Tensor] = {}
    state: dict[str, dict[Any, Any]] = {name: dict(values) for name, values in optimizer["state"].items()}
    for full_name, (shape, dtype) in checkpoint.tensors("optim").items():
        name, key = full_name.rsplit("/", 1)
        if name not in params:
            raise CheckpointError(f"{checkpoint.folder} holds optimizer state of {name}, which the model has not.")
        group = groups.get(name, {})
        on_host = not shape and not (group.get("fused") or group.get("capturable"))
        optim[full_name] = state[name][keys.get(full_name, key)] = empty_like_param(
            params[name], shape, dtype, on_host=on_host
        )
    optimizer["state"] = state
    read_model(trainer, checkpoint, training_state.get("changed_buffers", {}))
    live = trainer.live_model_state()
    checkpoint.read_into("optim", optim)
    for group_name, tensors in checkpoint.manifest.tensors.items():
        if group_name in ("model", "optim", HOOK_SHARDS):
            continue
        averages = {
            name: empty_like_param(params.get(name), tuple(record.shape), getattr(torch, record.dtype), on_host=False)
            for name, record in tensors.items()
        }
        checkpoint.read_into(group_name, averages)
        hooks[group_name] = averages
        if (
            tensors.keys() <= live.keys()
        ):  # an average: what it leaves out is taken from the model; it was frozen, and may be trained now
            averages |= {name: live[name] for name in checkpoint.manifest.frozen.keys() & live.keys() - tensors.keys()}
    state_dict = {"model": live, "training_state": training_state, **hooks}
    rank_state = checkpoint.rank_state(collectives.rank())
    if rank_state is not None:
        state_dict["rank"] = {key: value for key, value in rank_state.items() if key != OF_HOOKS}
    else:  # state that is not among the model's tensors: use rank 0's
        first = checkpoint.saved_rank_state(0)
        state_dict["first_rank"] = {name: first[name] for name in _OF_MODEL if name in first}
    return state_dict


def read_model(trainer: BaseTrainer, checkpoint: Checkpoint, changed: dict[str, Any]) -> None:
    """Read the weights in place, or into memory that the modules then load them from.

    Args:
        trainer: The trainer. It must be built.
        checkpoint: A checkpoint of this model.
        changed: The result of `changed_forms` at the save.

    Raises:
        CheckpointError: The checkpoint belongs to another model; nothing was changed.
    """
    model, described = trainer.unwrapped_model, checkpoint.tensors("model")
    live = trainer.live_model_state()
    made = made_entries(model, live)
    buffers = new_buffers(trainer, changed, described)
    fresh: dict[str, torch.Tensor] = {}
    for name in made & described.keys():
        fresh[name] = empty_like_param(live[name], *described[name], on_host=False)
    shared = {n: t for n, t in live.items() if n not in made and not is_dtensor(t) and memory_of(t) is not t}
    copies = {name: torch.empty_like(tensor, memory_format=torch.contiguous_format) for name, tensor in shared.items()}
    targets: dict[str, Any] = live | fresh | copies | buffers
    for name in checkpoint.manifest.frozen:
        targets.pop(name, None)
    # This checks all names, shapes and dtypes before it writes.
    checkpoint.read_into("model", {name: tensor for name, tensor in targets.items() if tensor is not None})
    for name in copies.keys() - buffers.keys():
        write_into(shared[name], copies[name])
    place_buffers(model, buffers, is_persistent=True)
    load_made_entries(model, fresh)


def _split(
    state: dict[str, dict[Any, Any]],
) -> tuple[dict[str, torch.Tensor], dict[str, dict[Any, Any]], dict[str, Any]]:
    """The optimizer's tensors by full name, its other values, and the keys that don't appear in a full name."""
    tensors: dict[str, torch.Tensor] = {}
    other: dict[str, dict[Any, Any]] = {}
    keys: dict[str, Any] = {}
    for name, values in state.items():
        other[name] = {}
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                other[name][key] = value
            elif isinstance(key, str) and "/" not in key and not key.startswith("$"):
                tensors[f"{name}/{key}"] = value
            else:
                full_name = f"{name}/${len(keys)}"
                tensors[full_name], keys[full_name] = value, key
    return tensors, other, keys
