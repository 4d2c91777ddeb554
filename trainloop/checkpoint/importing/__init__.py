"""Checkpoints of other tools, as names and tensors. Only a path that was named explicitly comes here: most are pickles.

In: a path, and no model: each module knows one form on the disk.
Out: a `Foreign`, whose tensors are read when they are asked for; `state/adoption.py` puts them into the live model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import CheckpointError
from ..format.foreign import describe_folder, foreign_kind
from .accelerate import open_accelerate
from .content import Foreign, ForeignOptimizer, TensorSource
from .origin import open_origin
from .weights import open_weights

__all__ = ["Foreign", "ForeignOptimizer", "TensorSource", "open_foreign"]

_OPEN: dict[str, Callable[[Path], Foreign]] = {
    "accelerate": open_accelerate,
    "origin": open_origin,
    "safetensors": open_weights,
    "torch": open_weights,
    "trainer": open_weights,
    "transformers": open_weights,
}


def open_foreign(path: Path) -> Foreign:
    """Open what another tool has saved. Reads the small files; tensors are read when they are asked for.

    Raises:
        CheckpointError: It is nothing that we know, or cannot be read.
    """
    kind = foreign_kind(path) if path.exists() else None
    if kind not in _OPEN:
        raise CheckpointError(f"{path} cannot be imported: it {describe_folder(path)}")
    return _OPEN[kind](path)
