"""Frozen parameters that `forward` changes itself: a codebook, or the teacher of a student.

Most frozen parameters never change. Copying a large backbone at each step would double its memory and cost time. So
only parameters that have been seen to change are copied.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from ..checkpoint.format.integrity import sums_of_bytes
from ..checkpoint.sharding import local_tensor
from ..errors import TrainloopWarning
from .non_finite import clean_name

_SMALL_BYTES = 2**26
"""Frozen parameters up to this size are always copied for the first window: nobody knows yet which of them change."""
_NUM_TOLD = 5


class FrozenKeeper:
    """Remembers the frozen parameters that change, and restores them.

    Checksums before and after the first window show which of them change. Later the versions of the tensors show it;
    every change increases the version, except one through `.data`. For the first window the smallest parameters are
    copied, up to the size of the trained parameters.

    Args:
        model: The model without its wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        params = dict(model.named_parameters())
        self._watched = {clean_name(name): p for name, p in params.items() if not p.requires_grad}
        self._changing: dict[str, nn.Parameter] = {}
        self._smallest: dict[str, nn.Parameter] = {}
        """Copied for the first window only."""
        self._kept: list[torch.Tensor] = []
        self._kept_names: list[str] = []
        self._values: list[torch.Tensor] = []
        self._sums: dict[str, int] = {}
        self._versioned: list[nn.Parameter] = []
        self._versions: list[int] = []
        self._num_windows = 0
        trained = sum(local_tensor(p).nbytes for p in params.values() if p.requires_grad)
        self._first_bytes = max(trained, _SMALL_BYTES)

    def fork(self) -> FrozenKeeper:
        """Another keeper of the parameters that are known to change, for use within a window or between two."""
        other = copy.copy(self)
        other._watched, other._versioned, other._versions = {}, [], []
        other._smallest, other._kept_names = {}, []
        other._changing = self._smallest | self._changing
        return other

    def renewed(self, model: nn.Module) -> FrozenKeeper:
        """A keeper of the parameters that are frozen now. It knows which of them change, as far as this one does."""
        other = FrozenKeeper(model)
        for name in self._changing.keys() & other._watched.keys():
            other._changing[name] = other._watched.pop(name)
        return other

    @property
    def is_needed(self) -> bool:
        """Whether the model has frozen parameters."""
        return bool(self._watched or self._changing)

    @torch.no_grad()
    def remember(self) -> None:
        """Remember the values before a window."""
        self._num_windows += 1
        if self._num_windows == 1:
            self._sums = self._checksums()
            self._smallest = self._find_smallest()
        elif self._num_windows == 2:
            self._smallest = {}
            self._note_changes()
        elif [p._version for p in self._versioned] != self._versions:
            self._note_changes()
        params = self._smallest | self._changing
        names, self._kept = list(params), [local_tensor(p) for p in params.values()]
        if names != self._kept_names:
            self._kept_names, self._values = names, [tensor.clone() for tensor in self._kept]
        elif names:
            torch._foreach_copy_(self._values, self._kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the values."""
        protected = self._smallest.keys() | self._changing.keys()
        lost = sorted(self._note_changes() - protected) if self._watched else []
        if self._kept:
            torch._foreach_copy_(self._kept, self._values)
        if lost:
            warnings.warn(
                "In a window that was discarded, `forward` changed frozen parameters for the first time:"
                f" {', '.join(lost[:_NUM_TOLD])}{', …' if len(lost) > _NUM_TOLD else ''}. These changes stay.",
                TrainloopWarning,
                stacklevel=2,
            )

    def _find_smallest(self) -> dict[str, nn.Parameter]:
        found, total = {}, 0
        for name, param in sorted(self._watched.items(), key=lambda item: local_tensor(item[1]).nbytes):
            total += local_tensor(param).nbytes
            if total > self._first_bytes:
                break
            found[name] = param
        return found

    def _note_changes(self) -> set[str]:
        """Find the parameters that have changed since the last check. They are copied from now on."""
        sums = self._checksums()
        changed = {name for name, value in sums.items() if self._sums[name] != value}
        self._changing |= {name: self._watched.pop(name) for name in sorted(changed)}
        # If a version increased although nothing changed, it can't be used as a sign of change.
        before = {id(p): version for p, version in zip(self._versioned, self._versions, strict=True)}
        self._versioned = [p for p in self._watched.values() if before.get(id(p), p._version) == p._version]
        self._versions = [p._version for p in self._versioned]
        return changed

    def _checksums(self) -> dict[str, int]:
        """Checksums of the watched parameters. Costs one pass over their memory and one read per device."""
        tensors = [local_tensor(p) for p in self._watched.values()]
        return dict(zip(self._watched, sums_of_bytes(tensors), strict=True))
