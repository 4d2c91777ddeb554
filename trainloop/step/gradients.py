"""The gradient of the whole model, or of the parameters of a phase: compute its norm, clip it, and drop it.

The results are bit-for-bit those of `accelerator.clip_grad_norm_`, which can't be used itself: it clips before anybody
has looked at the norm. If only the norm overflowed, it would destroy gradients that are finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from ..ranks import collectives

_EPS = 1e-6  # torch.nn.utils.clip_grads_with_norm_ divides by norm + 1e-6


_Axes: TypeAlias = "tuple[tuple[Any, int], ...]"
"""Dimensions of device meshes, each as mesh and number: those over which a tensor is sharded."""


class Gradients:
    """The gradients of some parameters. They are already reduced over the ranks.

    Norm and clipping work on the local shards of DTensors. torch's own functions take 26 + 12 us a DTensor on the host,
    and these 1 us. The norm needs one all-reduce, with a number for each parameter. It has the bits of torch's norm;
    only where some DTensors of a mesh are sharded and others replicated, the last bit may differ, because torch then
    divides the replicated norms over the ranks before it sums them.

    Args:
        params: Parameters of the prepared model.
        max_norm: Limit of the 2-norm. `None`: nothing is clipped.
        scaler: An enabled grad scaler; `norm` first unscales the gradients. `None`: there is none.
        optimizer: The raw optimizer, for the scaler.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        max_norm: float | None,
        scaler: torch.amp.GradScaler | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._max_norm = max_norm
        self._scaler = scaler
        self._optimizer = optimizer
        self._params = list(params)
        self._is_sharded = any(hasattr(param, "device_mesh") for param in self._params)
        self._placed = [(param, getattr(param, "placements", None), _sharded_axes(param)) for param in self._params]
        self._grads: list[torch.Tensor] = []  # local parts, read out once a step, for norm and clipping
        self.can_clip_unread = max_norm is None or max_norm >= 2 * _EPS
        """Whether a norm of 0 plus torch's `_EPS` is below the limit."""
        self._is_uniform = len({(p.dtype, p.device) for p in self._params}) <= 1

    def norm(self) -> torch.Tensor:
        """The 2-norm over all parameters and all shards: a 0-dim plain tensor on the device, the same on every rank.
        Call once a window, on every rank, because FSDP2 reduces it.
        """
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        self._grads, for_norm = self._local_grads()
        return self._norm(for_norm)

    def _local_grads(self) -> tuple[list[torch.Tensor], dict[_Axes, list[torch.Tensor]]]:
        """The local part of each gradient, and the same by the axes over which their squares are to be summed."""
        if self._is_sharded:
            return self._local_shards()
        grads = [grad for param in self._params if (grad := param.grad) is not None]
        return grads, {(): grads} if grads else {}

    @torch.no_grad()  # `to_local` is ten times as fast
    def _local_shards(self) -> tuple[list[torch.Tensor], dict[_Axes, list[torch.Tensor]]]:
        grads: list[torch.Tensor] = []
        by_axes: dict[_Axes, list[torch.Tensor]] = {}
        for param, placements, axes in self._placed:
            grad: Any = param.grad
            if grad is None:
                continue
            if placements is None:
                grads.append(grad)
                by_axes.setdefault((), []).append(grad)
                continue
            local = grad.to_local()
            grads.append(local)
            if grad.placements != placements:  # tensor parallelism leaves summands
                whole = _without_summands(grad)
                local, axes = whole.to_local(), _sharded_axes(whole)
            by_axes.setdefault(axes, []).append(local)
        return grads, by_axes

    def _norm(self, by_axes: dict[_Axes, list[torch.Tensor]]) -> torch.Tensor:
        totals: list[torch.Tensor] = []
        for axes, grads in by_axes.items():
            if self._is_uniform:
                of_each = torch.stack(torch._foreach_norm(grads, 2.0))
            else:
                norms = [norm for part in _by_device_and_dtype(grads) for norm in torch._foreach_norm(part, 2.0)]
                of_each = torch.stack([norm.to(grads[0].device) for norm in norms])
            for mesh, dim in axes:  # as DTensor sums norms
                of_each = of_each**2
                dist.all_reduce(of_each, group=mesh.get_group(dim))
                of_each = of_each**0.5
            total = torch.linalg.vector_norm(of_each, 2.0)
            totals.append(total.to(totals[0].device) if totals else total)
        if not totals:
            return torch.tensor(0.0)
        return totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals), 2.0)

    def clip(self, norm: torch.Tensor, norm_value: float) -> None:
        """Scale the gradient down to the limit if its norm is above the limit.

        Args:
            norm: The norm that `norm` returned.
            norm_value: The same norm, read by the host.
        """
        if self._max_norm is None or norm_value < self._max_norm * 0.999 - _EPS:
            return  # torch would multiply by exactly 1; the margin leaves rounding at the limit to torch
        self._scale_down(norm, self._max_norm)

    def clip_unread(self, norm: torch.Tensor) -> None:
        """Clip with the same bits as `clip`, before the host has read `norm`. If `norm` is not finite, the gradient is
        multiplied by exactly 1. Needs `can_clip_unread`.
        """
        if self._max_norm is not None:
            self._scale_down(torch.nan_to_num(norm, nan=0.0, posinf=0.0, neginf=0.0), self._max_norm)

    def _scale_down(self, norm: torch.Tensor, max_norm: float) -> None:
        # The same bits as torch's clamp(max_norm / (norm + eps), max=1), without the overhead of its operators.
        self._multiply((norm + _EPS).reciprocal_().mul_(max_norm).clamp_(max=1.0))

    def _multiply(self, coefficient: torch.Tensor) -> None:
        """Multiply the gradients in place by a 0-dim tensor."""
        by_kind = [self._grads] if self._is_uniform else _by_device_and_dtype(self._grads)
        for grads in filter(None, by_kind):
            torch._foreach_mul_(grads, coefficient.to(grads[0].device))

    def clip_overflown(self) -> float | None:
        """Clip a gradient whose norm is not finite although each element is: the sum of squares has overflowed.

        Call on every rank.

        Returns:
            The 2-norm, in double precision. None: some element is not finite, and nothing was changed.
        """
        self._grads, by_axes = self._local_grads()
        largest = _largest(self._grads)
        if not math.isfinite(largest):
            return None
        scale = 2.0 ** math.frexp(largest)[1]  # a power of two, so that the division is exact
        scaled = {axes: list(torch._foreach_div(grads, scale)) for axes, grads in by_axes.items()}
        norm = self._norm(scaled).double().item() * scale
        if self._max_norm is not None and norm > self._max_norm:
            torch._foreach_mul_(self._grads, self._max_norm / norm)
        return norm

    def drop(self) -> None:
        """Drop all gradients, as `zero_grad(set_to_none=True)` does, also of parameters that no optimizer has."""
        self._grads = []
        for param in self._params:
            param.grad = None


def _by_device_and_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """In the order in which torch's own functions take them."""
    grouped: Any = _group_tensors_by_device_and_dtype([tensors])  # type: ignore[list-item]
    return [part for (part,), _ in grouped.values()]


def _sharded_axes(tensor: Any) -> _Axes:
    """The axes over which a tensor is sharded; none, if it is whole on each rank."""
    placements = getattr(tensor, "placements", ())
    return tuple((tensor.device_mesh, dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def _without_summands(tensor: Any) -> Any:
    """A DTensor with its summands added up."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=placements)


def _largest(grads: Iterable[torch.Tensor]) -> float:
    """Largest absolute value of any element on any rank. Not finite if any element isn't. Call on every rank.

    torch's infinity norm can't be used: it refuses the empty shards that small parameters have on some ranks.
    """
    peaks = [grad.abs().max().double() for grad in grads if grad.numel()]
    own = torch.stack(peaks).max().item() if peaks else 0.0
    by_rank = collectives.gather_objects(own)
    return math.nan if any(map(math.isnan, by_rank)) else max(by_rank)


@contextmanager
def no_contribution(model: nn.Module) -> Iterator[None]:
    """Inside this context, forward and backward run with all their collectives, but add exactly zero to each gradient.

    Multiplying the loss by 0 isn't enough: 0 * inf and 0 * NaN are NaN. So each parameter's incoming gradient is
    replaced by zeros before it is accumulated and reduced. FSDP2's parameters exist only while they are gathered, so
    there the replacement is installed after each unit is gathered.
    """
    with ExitStack() as stack:
        seen: set[int] = set()

        def silence(params: Iterator[nn.Parameter]) -> None:
            for param in params:
                if param.requires_grad and id(param) not in seen and not hasattr(param, "device_mesh"):
                    seen.add(id(param))
                    stack.callback(param.register_hook(torch.zeros_like).remove)  # type: ignore[no-untyped-call]

        silence(model.parameters())
        if any(hasattr(p, "device_mesh") for p in model.parameters()):
            from torch.distributed.fsdp import FSDPModule

            def after_gathering(module: nn.Module, args: object) -> None:
                silence(module.parameters())

            hook: Callable[..., None] = after_gathering
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        yield
