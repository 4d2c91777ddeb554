"""The state that hooks have added to a run: sorts it by how a checkpoint stores it, and restores it.

averages of the weights   a flat dict of tensors: whole tensors in a separate folder
DTensors elsewhere        shards: each rank writes its own, and a mark takes their place in the nested state
values by rank            values that differ between ranks: in the state of each rank
everything else           in the state of the run
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.agreement import Ranks
from ..checkpoint.content import is_dtensor
from ..checkpoint.format.nested import encode
from ..ranks import collectives
from ..records import map_nested
from .live import empty_like_param

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

HOOK_SHARDS = "hook_shards"
"""The group of the DTensors."""
OF_HOOKS = "of_hooks"
"""Key of the values by rank in a rank's state."""
_MARK = "trainloop.shard"
_FOLDERS = {"optim", "state", HOOK_SHARDS}
"""Names of folders in a checkpoint that no hook's weights may have."""


@dataclass
class HookState:
    """The hooks' part of a state, sorted."""

    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    shards: dict[str, torch.Tensor] = field(default_factory=dict)
    of_run: dict[str, Any] = field(default_factory=dict)
    of_rank: dict[str, Any] = field(default_factory=dict)


def sort_hook_state(trainer: BaseTrainer, values: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> HookState:
    """Sort the state that hooks have added. Call on every rank, because the ranks compare their values.

    Args:
        trainer: The trainer.
        values: By the hooks' keys.
        model: The model's tensors by clean name.
    """
    sorted_state, nested = HookState(), {}
    for key, value in values.items():
        if _can_be_folder(key, value) and all(n in model and t.shape == model[n].shape for n, t in value.items()):
            sorted_state.weights[key] = value
        else:
            nested[key] = _without_shards(trainer, key, value, sorted_state.shards)
    differing = _differing_keys(nested)
    for key, value in nested.items():
        if key in differing:
            sorted_state.of_rank[key] = value
        elif _can_be_folder(key, value):
            sorted_state.weights[key] = value
        else:
            sorted_state.of_run[key] = value
    return sorted_state


def join_hook_state(trainer: BaseTrainer, checkpoint: Checkpoint, of_run: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse for the nested part: puts values by rank and shards back in their places. Call on every rank.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint to load.
        of_run: The saved `HookState.of_run`.
    """
    is_same_size = checkpoint.manifest.world_size == collectives.world_size()
    own = checkpoint.saved_rank_state(collectives.rank() if is_same_size else 0).get(OF_HOOKS, {})
    if own and not is_same_size:
        trainer.logger.warning(
            f"Some hooks saved a different state on each rank ({', '.join(map(repr, own))}). The checkpoint was saved"
            f" by {checkpoint.manifest.world_size} processes, and this run has {collectives.world_size()}. So every"
            " rank loads the state of rank 0."
        )
    nested = {**of_run, **own}
    described = checkpoint.tensors(HOOK_SHARDS) if HOOK_SHARDS in checkpoint.manifest.tensors else {}
    if not described:
        return nested
    shards: dict[str, torch.Tensor] = {}
    map_nested(lambda mark: _make_room(trainer, mark, described, shards), nested, _is_mark)
    checkpoint.read_into(HOOK_SHARDS, {**_rest(described, shards), **shards})
    joined: dict[str, Any] = map_nested(lambda mark: shards[mark[_MARK]], nested, _is_mark)
    return joined


def _can_be_folder(key: Any, value: Any) -> bool:
    is_name = isinstance(key, str) and key.isidentifier() and key not in _FOLDERS
    is_flat = type(value) is dict and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())
    return is_name and is_flat


# ---------------------------------------------------------------------- what differs from rank to rank


def _differing_keys(nested: Mapping[str, Any]) -> set[str]:
    """The keys whose values differ between the ranks that have them. Each rank sends one number. Only if these differ,
    it sends a list of numbers.
    """
    if collectives.world_size() == 1:
        return set()
    sums = {key: _checksum(value) for key, value in nested.items()}
    failure = "The hooks' state cannot be compared"
    if Ranks().do(lambda: zlib.crc32(repr(sorted(sums.items(), key=str)).encode()), _are_equal, failure):
        return set()

    def decide(by_rank: list[dict[str, int]]) -> set[str]:
        first = by_rank[0]  # a key that only rank 0 has belongs to the run
        return {key for own in by_rank for key, value in own.items() if key not in first or first[key] != value}

    return Ranks().do(lambda: sums, decide, failure)


def _are_equal(by_rank: list[int]) -> bool:
    return len(set(by_rank)) == 1


def _checksum(value: Any) -> int:
    try:
        text, tensors = encode(value)
    except (TypeError, ValueError):
        return 0  # the save will raise, and name the place
    sums = {name: collectives.checksum(tensor) for name, tensor in tensors.items()}
    return zlib.crc32((json.dumps(text) + repr(sums)).encode())


# ---------------------------------------------------------------------- DTensors


def _without_shards(trainer: BaseTrainer, key: Any, value: Any, shards: dict[str, torch.Tensor]) -> Any:
    """The value with a mark in place of each DTensor. The DTensors are added to `shards`."""
    params = trainer.named_parameters()

    def take(tensor: Any) -> dict[str, Any]:
        name = f"{key}/{len(shards)}"
        shards[name] = tensor
        like = next((name for name, param in params.items() if _lies_as(param, tensor)), None)
        dims = [placement.dim if placement.is_shard() else None for placement in tensor.placements]
        return {_MARK: name, "like": like, "dims": dims}

    return map_nested(take, value, lambda leaf: isinstance(leaf, torch.Tensor) and is_dtensor(leaf))


def _lies_as(param: Any, tensor: Any) -> bool:
    return (
        is_dtensor(param)
        and param.shape == tensor.shape
        and param.placements == tensor.placements
        and param.device_mesh == tensor.device_mesh
    )


def _is_mark(value: Any) -> bool:
    return type(value) is dict and _MARK in value


def _make_room(trainer: BaseTrainer, mark: Mapping[str, Any], described: Any, shards: dict[str, torch.Tensor]) -> Any:
    """Make memory for a shard: with a parameter's layout, or over the model's mesh, or whole if there is no mesh."""
    params: Mapping[str, Any] = trainer.named_parameters()
    shape, dtype = described[mark[_MARK]]
    like = params.get(mark["like"])
    if like is not None and tuple(like.shape) == shape:
        shards[mark[_MARK]] = empty_like_param(like, shape, dtype, on_host=False)
        return mark
    meshes = [p.device_mesh for p in params.values() if is_dtensor(p) and p.device_mesh.ndim == len(mark["dims"])]
    if not meshes:
        shards[mark[_MARK]] = torch.empty(shape, dtype=dtype, device=trainer.device)
        return mark
    from torch.distributed.tensor import Replicate, Shard, empty

    placements = [Replicate() if dim is None else Shard(dim) for dim in mark["dims"]]
    shards[mark[_MARK]] = empty(shape, dtype=dtype, device_mesh=meshes[0], placements=placements)
    return mark


def _rest(described: Any, shards: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Memory for shards that no mark names, for example those in the state of another rank."""
    return {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in described.items() if n not in shards}
