"""Gathers the samples of all ranks, for a loss that compares each sample with all others, such as CLIP's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from . import collectives

_is_padding = False
"""Whether this rank repeats a batch, only because other ranks still have one."""
_is_gathering = False


def gather_samples(samples: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Gather a batch from all ranks. The batches may have different sizes. Call on every rank.

    Gradients flow back to the rank that a sample came from. In the last round of an evaluation, a rank without a batch
    repeats one that doesn't count. The other ranks don't get its samples; the rank itself gets them after the others'.

    Costs one exchange of host integers, and one collective on the device (and another one in the backward pass).

    Args:
        samples: This rank's samples, batch x anything. All dimensions but the first are the same on every rank.

    Returns:
        The samples of all ranks, by rank, and the index of this rank's first sample in them.

    Raises:
        ValueError: `samples` has no dimensions.

    Example:
        ```python
        images, texts = self.model(batch)
        all_texts, start = gather_samples(texts)
        labels = torch.arange(len(images), device=images.device) + start
        loss = nn.functional.cross_entropy(images @ all_texts.T, labels)
        ```
    """
    if samples.dim() == 0:
        raise ValueError("`samples` must have a dimension for the samples, but has no dimensions.")
    rank, world_size = collectives.rank(), collectives.world_size()
    if world_size == 1:
        return samples, 0
    with _gathering():
        sizes = [size for (size,) in collectives.gather_ints([-len(samples) if _is_padding else len(samples)])]
        length = max(map(abs, sizes))
        padded = samples
        if length > len(samples):
            padded = torch.cat([samples, samples.new_zeros(length - len(samples), *samples.shape[1:])])
        gathered: torch.Tensor = _Gather.apply(padded.contiguous())  # type: ignore[no-untyped-call]  # torch's
    parts = [gathered[i, :size] for i, size in enumerate(sizes) if size > 0]
    start = sum(size for size in sizes[:rank] if size > 0)
    if _is_padding:
        start = sum(map(len, parts))
        parts.append(samples)
    return torch.cat(parts), start


class _Gather(torch.autograd.Function):
    """Batch x anything -> ranks x batch x anything."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        flat = own.detach().reshape(-1).view(torch.uint8)  # as bytes, because gloo doesn't support every dtype
        gathered = flat.new_empty(collectives.world_size(), flat.numel())
        dist.all_gather(list(gathered), flat)
        return gathered.view(own.dtype).reshape(-1, *own.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        wide = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        summed = wide.contiguous().clone()
        dist.all_reduce(summed)
        return summed[collectives.rank()].to(grad.dtype)


@contextmanager
def padding(is_padding: bool) -> Iterator[None]:
    """Inside this context, this rank's samples don't count."""
    global _is_padding
    before, _is_padding = _is_padding, is_padding
    try:
        yield
    finally:
        _is_padding = before


def is_gathering() -> bool:
    """Whether `gather_samples` is communicating right now."""
    return _is_gathering


@contextmanager
def _gathering() -> Iterator[None]:
    global _is_gathering
    _is_gathering = True
    try:
        yield
    finally:
        _is_gathering = False
