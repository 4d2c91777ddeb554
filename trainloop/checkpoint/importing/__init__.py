"""Reads checkpoints of other tools. Only paths that the user named are read here, because most contain pickles.

In: a path; no model is needed. Each module knows one format.
Out: a `Foreign`, whose tensors are read on demand. `state/adoption.py` puts them into the live model.
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
    """Open a checkpoint of another tool. Reads only the small files; tensors are read on demand.

    Raises:
        CheckpointError: The format is unknown, or a file cannot be read.
    """
    kind = foreign_kind(path) if path.exists() else None
    if kind not in _OPEN:
        raise CheckpointError(f"{path} cannot be imported: it {describe_folder(path)}")
    return _OPEN[kind](path)
