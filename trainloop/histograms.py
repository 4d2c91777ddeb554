"""Converts the arguments of `log_histogram` and `log_text` into flat mappings and plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import describe
from .records import flatten_objects

_NUM_BINS = 64
_CHUNK = 2**24  # number of values that are counted at once, to limit the memory for intermediate results


@dataclass(frozen=True)
class Histogram:
    """The number of values in each of several bins of equal width."""

    edges: list[float]
    """Edges of the bins: one more than `counts`."""
    counts: list[int]
    sum: float
    sum_squares: float
    num_non_finite: int
    """Number of values that are NaN or infinite. They are in no bin."""


def flatten_histograms(records: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Flatten nested tensors and arrays. Call on every rank that has them.

    Raises:
        TypeError: `records` is not a mapping, a key is not a string, or a value is not a tensor or an array.
    """
    flat = flatten_objects(records, "log_histogram", "tensors")
    for path, value in flat.items():
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise TypeError(f"`{'/'.join(path)}` must be a tensor or a numpy array, but is {describe(value)}.")
    return flat


def flatten_texts(records: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Flatten nested texts.

    Raises:
        TypeError: `records` is not a mapping, a key is not a string, or a value is not a string.
    """
    flat = flatten_objects(records, "log_text", "strings")
    for path, value in flat.items():
        if not isinstance(value, str):
            raise TypeError(f"`{'/'.join(path)}` must be a string, but is {describe(value)}.")
    return flat


def to_histogram(key: str, value: Any) -> Histogram:
    """Count values on their device, and read the counts.

    Args:
        key: Name of the values in error messages, for example "weights/first".
        value: A tensor or a numpy array of real numbers, of any shape.

    Raises:
        TypeError: It is complex or sparse.
        ValueError: It is empty.
    """
    tensor = (value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))).detach()
    if tensor.is_complex() or tensor.is_sparse:
        raise TypeError(f"`{key}` must be a dense tensor of real numbers, but has dtype {tensor.dtype}.")
    if tensor.numel() == 0:
        raise ValueError(f"`{key}` must have at least one value, but has shape {tuple(tensor.shape)}.")
    flat = tensor.reshape(-1)
    wide = torch.float32 if flat.device.type == "mps" else torch.float64
    parts = torch.split(flat, _CHUNK)
    lows, highs, sums, squares, num_finite = [], [], [], [], []
    for part in parts:
        finite = part.to(wide)
        mask = torch.isfinite(finite)
        zeros = torch.where(mask, finite, 0)
        lows.append(torch.where(mask, finite, math.inf).min())
        highs.append(torch.where(mask, finite, -math.inf).max())
        sums.append(zeros.sum())
        squares.append(zeros.square().sum())
        num_finite.append(mask.sum().to(wide))
    found = [torch.stack(lows).min(), torch.stack(highs).max()]
    found += [torch.stack(many).sum() for many in (sums, squares, num_finite)]
    low, high, total, total_squares, count = torch.stack(found).tolist()
    num_non_finite = flat.numel() - int(count)
    if not count:
        return Histogram([0.0, 1.0], [0], 0.0, 0.0, num_non_finite)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=flat.device)
    for part in parts:
        finite = part.to(wide)
        finite = finite[torch.isfinite(finite)]
        bins = ((finite / 2 - low / 2) / (high / 2 - low / 2) * _NUM_BINS).long().clamp_(0, _NUM_BINS - 1)
        counts += torch.bincount(bins, minlength=_NUM_BINS)
    edges = [low + (high / _NUM_BINS - low / _NUM_BINS) * i for i in range(_NUM_BINS)] + [high]
    return Histogram(edges, counts.tolist(), total, total_squares, num_non_finite)
