"""The content of a checkpoint, as the caller of a save provides it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ..errors import describe
from .format.dtypes import dtype_name
from .format.nested import RESERVED_NAME
from .format.tables import STATE, FrozenRecord
from .format.tensorfile import check_storable
from .placement import Layout, Layouts

Tensors: TypeAlias = Mapping[str, torch.Tensor]
Described: TypeAlias = "dict[str, dict[str, tuple[str, tuple[int, ...], Layout | None]]]"
"""By group and name: dtype, shape, and for a DTensor its layout over the ranks."""


@dataclass
class Content:
    """The data to save. Each rank passes its own. Groups, names, shapes and dtypes must be the same on every rank, in
    the same order.
    """

    weights: Mapping[str, Tensors] = field(default_factory=dict)
    """By group ("model", "ema") and name. They are written whole, so that other software can read them: a DTensor is
    gathered. A plain tensor must be the same on each rank, or the save fails. Tensors that share memory are written
    once."""
    shards: Mapping[str, Tensors] = field(default_factory=dict)
    """By group ("optim") and name. Of a DTensor each rank writes its own shard, without communication. A plain tensor
    must be the same on each rank, and one of them writes it."""
    global_state: Any = None
    """Nested state that is the same on each rank (see `nested.encode`). That of rank 0 is written."""
    rank_state: Any = None
    """Nested state of this rank, for example its random generators."""
    must_be_finite: Collection[str] = ()
    """Names of tensors, "model/fc.weight" or "optim/fc.weight/exp_avg", and paths of tensors in `rank_state`,
    "state/buffers/running_mean". The checkpoint is healthy if all their elements are finite."""
    of_rank_zero: Collection[str] = ()
    """Names of plain tensors among the weights that may differ between ranks, as BatchNorm's statistics do. Those of
    rank 0 are written."""
    frozen: Mapping[str, FrozenRecord] = field(default_factory=dict)
    """By name: parameters of the group "model" that are left out because they are frozen and can be built again. The
    records of rank 0 are written."""

    def groups(self) -> dict[str, Tensors]:
        """All groups, weights first."""
        return {**self.weights, **self.shards}

    def describe(self, world_size: int) -> Described:
        """The description that must be the same on all ranks.

        Args:
            world_size: Number of ranks.

        Raises:
            TypeError: A tensor cannot be stored.
            ValueError: The name of a group is not valid or not unique, or a tensor's name or a shard can't be saved.
        """
        names = [*self.weights, *self.shards]
        for group in names:
            if not group.isidentifier() or group == STATE or names.count(group) > 1:
                raise ValueError(
                    f'Names of groups must be different identifiers, and not "{STATE}", but they are: {names}.'
                )
        for group, tensors in self.groups().items():
            for name, tensor in tensors.items():
                _check_name(group, name)
                check_storable(f"{group}/{name}", tensor)
                if group in self.shards and is_dtensor(tensor):
                    _check_shard(f"{group}/{name}", tensor)
        layouts = Layouts(world_size)
        return {
            group: {
                name: (dtype_name(t.dtype), tuple(t.shape), layouts.of(t) if is_dtensor(t) else None)
                for name, t in tensors.items()
            }
            for group, tensors in self.groups().items()
        }

    def num_bytes(self, aliases: Mapping[str, Mapping[str, str]]) -> int:
        """Bytes of all weights and shards of all ranks together, without aliases."""
        return sum(
            tensor.numel() * tensor.element_size()
            for group, tensors in self.groups().items()
            for name, tensor in tensors.items()
            if name not in aliases[group]
        )


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`. Importing that class would take half a second."""
    return hasattr(tensor, "device_mesh")


def _check_name(group: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"Names of tensors must be strings, but one in {group} is {describe(name)}.")
    if name == RESERVED_NAME:
        raise ValueError(f"A tensor in {group} is named {name}, which safetensors keeps for itself. Rename it.")


def _check_shard(name: str, tensor: torch.Tensor) -> None:
    if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} is a DTensor whose ranks hold summands (placements {tensor.placements})."  # type: ignore[attr-defined]
            " Redistribute it to shards before it is saved."
        )
