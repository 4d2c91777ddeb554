"""Makes DDP sum gradients in the same order in every process life of a run."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainloopWarning
from ..step.gradient_checks import ddp_modules


def settle_buckets(model: nn.Module) -> None:
    """Make DDP arrange its buckets now instead of after its first backward pass. Call on every rank.

    In each process, DDP rearranges its buckets after the first backward pass. With 3 or more ranks, the position of a
    gradient in its bucket determines the order in which it is summed. So the first step after a restart would differ
    in its last bits from the same step of an uninterrupted run.

    The buckets get the order that DDP assumes for the backward pass: from the last registered parameter to the first.
    So the order doesn't depend on the first batch. Neither the model nor the user's hooks run: DDP is told that each
    gradient is ready, and reduces zeros once.

    Args:
        model: The prepared model. Without DDP, nothing happens. With `find_unused_parameters=True` DDP never rearranges
            its buckets.
    """
    for ddp in ddp_modules(model):
        if ddp._has_rebuilt_buckets or ddp._use_python_reducer:
            continue
        if ddp.static_graph:  # it counts the hooks of its first backward pass, which our backward pass would break
            if dist.get_world_size() > 2:
                warnings.warn(
                    "DDP runs with `static_graph=True`, which rearranges its buckets in the first steps of each"
                    " process. With more than 2 processes, a resumed run therefore differs in its last bits from an"
                    " uninterrupted one.",
                    TrainloopWarning,
                    stacklevel=2,
                )
            continue
        if ddp.find_unused_parameters:
            continue
        params = [
            param
            for name, param in ddp.module.named_parameters()
            if param.requires_grad and name not in ddp.parameters_to_ignore
        ]
        _reduce_zeros(ddp, len(params))
        for param in params:
            param.grad = None
        ddp._has_rebuilt_buckets = ddp.reducer._rebuild_buckets()


def _reduce_zeros(ddp: DistributedDataParallel, num_params: int) -> None:
    """Call DDP's own hook for each parameter, last one first. The hook must be called in a backward pass, so this runs
    the backward pass of a separate scalar.
    """

    def fire(grad: torch.Tensor) -> None:
        for index in reversed(range(num_params)):
            ddp.reducer._autograd_hook(index)  # type: ignore[attr-defined]

    with torch.enable_grad():
        scalar = torch.zeros((), requires_grad=True)
        output = scalar * 1
        output.register_hook(fire)  # type: ignore[no-untyped-call]
        ddp.reducer.prepare_for_backward([])
        output.backward()  # type: ignore[no-untyped-call]
