"""The weight of each micro-batch in the step's mean loss, exact over the window and all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ranks import collectives


def loss_factors(weights: Sequence[Any], device: torch.device) -> tuple[list[float] | list[torch.Tensor] | None, Any]:
    """Convert a window's weights into factors for its losses. Call on every rank.

    Factor i is `w_i * N * world_size / total`. Accelerate's `backward` divides by N, and DDP takes the mean over the
    ranks, so the result is `sum(w_i * loss_i) / total`.

    Args:
        weights: What `batch_weight` returned for the window's N micro-batches.
        device: The device of this rank.

    Returns:
            The factors: N floats, or N 0-dim fp64 tensors if all weights are tensors on an accelerator (they are not
            read; the factors are NaN if the total is 0). An empty list: all weights of all ranks are 0. None:
            `batch_weight` returned None for all. And the total weight over the window and all ranks, a number or a
            0-dim fp64 tensor.

    Raises:
        ValueError: On every rank, if any rank's weight is not a number >= 0, or only some micro-batches have one.
    """
    on_device = [isinstance(w, torch.Tensor) and w.device.type != "cpu" for w in weights]
    scale = len(weights) * collectives.world_size()
    if all(on_device):
        tensors = torch.stack([w.detach().double().reshape(()) for w in weights])
        device_total = tensors.sum()
        if collectives.world_size() > 1:
            torch.distributed.all_reduce(device_total)
        return list((tensors * (scale / device_total)).unbind()), device_total
    read = [math.nan if is_on_device else host_weight(w) for w, is_on_device in zip(weights, on_device, strict=True)]
    given = [w for w in read if w is not None]
    total, num_given, num_all = collectives.sum_over_ranks([sum(given), len(given), len(read)])
    # Checked after the reduction: a rank that raised alone would leave the others waiting.
    if math.isnan(total):
        raise ValueError(
            "`batch_weight` must return a finite number >= 0, a 0-dim tensor, or None, the same kind for every"
            " micro-batch; on some rank it did not."
        )
    if 0 < num_given < num_all:
        raise ValueError(
            "`batch_weight` must return a weight for every micro-batch or None for every one, but of a window's"
            f" {int(num_all)} micro-batches {int(num_given)} have a weight."
        )
    if not num_given:
        return None, None
    return [w * scale / total for w in given] if total > 0 else [], total


def host_weight(weight: Any) -> float | None:
    """Convert a weight to a float. NaN: it is not a valid weight."""
    if weight is None:
        return None
    if isinstance(weight, torch.Tensor):
        weight = weight.tolist()  # on a CPU tensor: no sync
    if not isinstance(weight, bool):
        try:
            number = float(weight)
        except (TypeError, ValueError):
            return math.nan
        if number >= 0 and math.isfinite(number):
            return number
    return math.nan


def weighted_loss(loss: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """`loss * factor`, both 0-dim; 0 if the factor is 0, even for a non-finite loss. Keeps the graph, because the
    collectives in the backward pass of a dropped micro-batch have to run.
    """
    finite = loss.nan_to_num(0, 0, 0)
    if isinstance(factor, float):
        return (loss if factor != 0.0 else finite) * factor
    return torch.where(factor == 0, finite, loss) * factor
