"""The gradient of the whole model, or of the parameters of a phase: compute its norm, clip it, and drop it.

The results are bit-for-bit those of `accelerator.clip_grad_norm_`, which can't be used itself: it clips before anybody
has looked at the norm. If only the norm overflowed, it would destroy gradients that are finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..ranks import collectives

_EPS = 1e-6  # torch.nn.utils.clip_grads_with_norm_ divides by norm + 1e-6


class Gradients:
    """The gradients of some parameters. They are already reduced over the ranks.

    How the norm is computed is decided once, in the constructor: by one fused call if all parameters are plain tensors
    of one dtype on one device, and by torch's own functions otherwise.

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
        self._grads: list[torch.Tensor] = []  # if plain: read once a step, for the norm and for clipping
        meshes = [getattr(p, "device_mesh", None) for p in self._params]
        self._groups: list[list[nn.Parameter]] = [
            [p for p, own in zip(self._params, meshes, strict=True) if own == mesh] for mesh in dict.fromkeys(meshes)
        ]
        self.can_clip_unread = max_norm is None or max_norm >= 2 * _EPS
        """Whether a norm of 0 plus torch's `_EPS` is below the limit."""
        self._is_plain = not any(meshes) and len({(p.dtype, p.device) for p in self._params}) <= 1

    def norm(self) -> torch.Tensor:
        """The 2-norm over all parameters and all shards: a 0-dim plain tensor on the device, the same on every rank.
        Call once a window, on every rank, because FSDP2 reduces it.
        """
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self._is_plain:
            self._grads = [grad for p in self._params if (grad := p.grad) is not None]
            if self._grads:
                norms = torch._foreach_norm(self._grads, 2.0)
                norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
                return norm
        return self._norm()

    def _largest(self) -> float:
        """Largest absolute value of any element, read by the host. Not finite if any element isn't. Call on every rank.

        torch's infinity norm can't be used: it refuses the empty shards that small parameters have on some ranks.
        """
        grads = [p.grad for p in self._params if p.grad is not None]
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        peaks = [grad.abs().max().double() for grad in local if grad.numel()]
        own = torch.stack(peaks).max().item() if peaks else 0.0
        by_rank = collectives.gather_objects(own)
        return math.nan if any(map(math.isnan, by_rank)) else max(by_rank)

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
        if self._is_plain and self._grads:
            # The same bits as torch's clamp(max_norm / (norm + eps), max=1), without the overhead of its operators.
            coefficient = (norm + _EPS).reciprocal_().mul_(max_norm).clamp_(max=1.0)
            torch._foreach_mul_(self._grads, coefficient)
            return
        for group in self._groups:
            mesh = getattr(group[0], "device_mesh", None)
            if mesh is None:
                torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
            else:
                from torch.distributed.tensor import DTensor

                torch.nn.utils.clip_grads_with_norm_(group, max_norm, DTensor.from_local(norm, mesh))

    def clip_overflown(self) -> float | None:
        """Clip a gradient whose norm is not finite although each element is: the sum of squares has overflowed.

        Call on every rank.

        Returns:
            The 2-norm, in double precision. None: some element is not finite, and nothing was changed.
        """
        largest = self._largest()
        if not math.isfinite(largest):
            return None
        scale = 2.0 ** math.frexp(largest)[1]  # a power of two, so that the division is exact
        grads = [p.grad for p in self._params if p.grad is not None]
        with self._replaced(torch._foreach_div(grads, scale)):
            norm = self._norm().double().item() * scale
        if self._max_norm is not None and norm > self._max_norm:
            torch._foreach_mul_(grads, self._max_norm / norm)
        return norm

    def drop(self) -> None:
        """Drop all gradients, as `zero_grad(set_to_none=True)` does, also of parameters that no optimizer has."""
        self._grads = []
        for param in self._params:
            param.grad = None

    def _norm(self) -> torch.Tensor:
        norms = []
        for group in self._groups:
            norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), 2.0)

    @contextmanager
    def _replaced(self, grads: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> Iterator[None]:
        holders = [p for p in self._params if p.grad is not None]
        originals = [p.grad for p in holders]
        try:
            for param, grad in zip(holders, grads, strict=True):
                param.grad = grad
            yield
        finally:
            for param, original in zip(holders, originals, strict=True):
                param.grad = original


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
