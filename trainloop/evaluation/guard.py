"""Refuses the user's own collectives in a round of an evaluation in which the ranks have unequal batches.

Otherwise a padded batch would silently count twice, and batches of different sizes would abort the process inside gloo,
or hang. Communication of the model's wrappers (DDP, FSDP2, tensor parallelism) and its own layers is allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ranks import collectives, samples

Gap: TypeAlias = Literal["", "sizes", "padding"]
"""What differs in a round: nothing, the sizes of the batches, or whether a rank has a batch at all."""

_NAMESPACES = ("c10d", "_c10d_functional")
_WRAPPERS = ("torch.distributed.fsdp.", "torch.distributed.tensor.", "torch.nn.parallel.")


def guarded(model: nn.Module, gap: Gap) -> AbstractContextManager[Any]:
    """The context in which `eval_forward` runs in a round with this gap."""
    return _Guard(set(map(id, model.modules())), gap) if gap else nullcontext()


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    def __init__(self, modules: Collection[int], gap: Gap) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._modules, self._gap = modules, gap

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if func.namespace in _NAMESPACES and not samples.is_gathering() and not self._is_of_model():
            self._check(name, args)
        return func(*args, **(kwargs or {}))

    def _is_of_model(self) -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(_WRAPPERS):
                return True
            if frame.f_code is nn.Module._call_impl.__code__ and id(frame.f_locals.get("self")) in self._modules:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def _check(self, name: str, args: Any) -> None:
        operation = name.rpartition("::")[2].partition(".")[0].strip("_")
        if self._gap == "sizes":
            shapes = [tuple(tensor.shape) for tensor in _tensors(args)]
            with samples._gathering():
                by_rank = collectives.gather_objects((operation, shapes))
            if all(other == by_rank[0] for other in by_rank):
                return
            why = f"the batches of the ranks have different sizes: {[shapes for _, shapes in by_rank]}"
        else:
            why = "some ranks have no batch left, and run one again that must not count"
        raise ValueError(
            f"`eval_forward` or `predict_forward` calls a collective ({operation}) in a round in which {why}."
            " Gather with `trainloop.gather_samples`, which keeps such batches apart. To collect values per sample,"
            " return them in `trainloop.PerSample`, without gathering."
        )


def _tensors(args: Any) -> list[torch.Tensor]:
    if isinstance(args, torch.Tensor):
        return [args]
    return [tensor for item in args for tensor in _tensors(item)] if isinstance(args, list | tuple) else []
