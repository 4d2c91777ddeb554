"""The content of another tool's checkpoint, in a common form for all tools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from ...errors import CheckpointError
from ..content import is_dtensor
from ..format.boxes import slices
from ..sharding import local_box, local_tensor

Described: TypeAlias = "dict[str, tuple[tuple[int, ...], torch.dtype]]"
"""Shape and dtype by name."""


class TensorSource(Protocol):
    """Whole tensors on the disk. The methods don't communicate, so a single rank may call them."""

    def described(self) -> Described:
        """Shapes and dtypes of the tensors."""

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors; of a DTensor, this rank's shard. Values are cast to the dtype of the target.

        Args:
            targets: By name: tensors with the shapes of `described`.
        """


@dataclass(frozen=True)
class LoadedTensors:
    """Tensors that `torch.load` has mapped. Their memory is read only when values are copied out."""

    tensors: Mapping[str, torch.Tensor]

    def described(self) -> Described:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        for name, target in targets.items():
            part = self.tensors[name][slices(local_box(target), (0,) * target.dim())]
            local_tensor(target).copy_(part)


@dataclass(frozen=True)
class ForeignOptimizer:
    """An optimizer's state. A key is a parameter's name, or its position in the parameter groups, from 0."""

    param_groups: list[dict[str, Any]]
    """In torch's form; "params" contains keys."""
    values: dict[int | str, dict[str, Any]]
    """The values that are not tensors, by key and name."""
    tensors: TensorSource
    """The tensors, by `f"{key}/{name}"`."""

    @classmethod
    def from_state_dict(cls, state_dict: Any, path: Path) -> ForeignOptimizer:
        """Convert the result of `Optimizer.state_dict` or of torch's `get_optimizer_state_dict`.

        Raises:
            CheckpointError: It is neither.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise CheckpointError(f"{path} holds no optimizer's state: it has no `state` and `param_groups`")
        tensors, values = {}, {}
        for key, state in state_dict["state"].items():
            values[key] = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
            tensors.update({f"{key}/{n}": value for n, value in state.items() if isinstance(value, torch.Tensor)})
        return cls(state_dict["param_groups"], values, LoadedTensors(tensors))


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another tool."""

    path: Path
    what: str
    """What kind of checkpoint it is: "an `accelerator.save_state` folder"."""
    weights: Mapping[str, TensorSource]
    """"model", and averages of the model by their names."""
    optimizer: ForeignOptimizer | None = None
    lr_scheduler: dict[str, Any] | None = None
    grad_scaler: dict[str, Any] | None = None
    step: int | None = None
    """Number of optimizer steps, if the checkpoint contains it."""
    num_processes: int = 1
    """Number of processes that saved it, if known."""
    hooks: Mapping[str, Any] = field(default_factory=dict)
    """State for hooks in addition to `weights`, by the key that each hook looks for."""
    not_taken: tuple[str, ...] = ()
    """Descriptions of content, or of state that a resume needs, that can't be taken from the checkpoint."""


_REFUSED = re.compile(r"GLOBAL (\w+(?:\.\w+)+) was not an allowed global")  # no builtins: `getattr` is never allowed


def load_pickle(path: Path) -> Any:
    """Read tensors and plain values that `torch.save` has written. No code in the file is run.

    Raises:
        CheckpointError: The file contains anything else, or cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as ex:
        if "mmap" not in str(ex):  # files of torch before 1.6 can't be mapped
            raise CheckpointError(f"{path} cannot be read: {_first_line(ex)}") from ex
    except Exception as ex:  # usually UnpicklingError, but a pickle may raise anything
        raise _unsafe(path, ex) from ex
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as ex:
        raise _unsafe(path, ex) from ex


def _unsafe(path: Path, ex: Exception) -> CheckpointError:
    refused = _REFUSED.search(str(ex))
    if refused is not None:
        name = refused[1]
        module = name.rpartition(".")[0]
        return CheckpointError(
            f"{path} holds an object of {name}, and a pickle is read with `torch.load(weights_only=True)` only, since"
            f" it may run code. If you trust {name}, allow it before `train`: `import {module}` and"
            f" `torch.serialization.add_safe_globals([{name}])`. Or save the file again without it"
        )
    return CheckpointError(
        f"{path} cannot be read with `torch.load(weights_only=True)`, and a pickle is never read in another way, since"
        f" it may run code: {_first_line(ex)}"
    )


def _first_line(ex: Exception) -> str:
    return (str(ex).strip() or type(ex).__name__).splitlines()[0].rstrip(".")


def is_flat(value: Any) -> bool:
    """Whether a value maps names to tensors, as a module's `state_dict` does."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in value.items())
    )


def check_whole(tensors: Mapping[str, torch.Tensor], path: Path) -> LoadedTensors:
    """Return the tensors if none of them is a shard.

    Raises:
        CheckpointError: Some are.
    """
    if parts := [name for name, tensor in tensors.items() if is_dtensor(tensor)]:
        raise CheckpointError(f"{path} holds one rank's parts of tensors (DTensors: {parts[0]}, ...), not the tensors")
    return LoadedTensors(tensors)
