"""Keeps layers with running statistics (BatchNorm) in fp32 under FSDP2, as autocast does under DDP.

FSDP2 casts the parameters of a whole unit to its `param_dtype`. It doesn't cast the statistics, which are buffers, and
BatchNorm can't combine bf16 weights with fp32 statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def full_precision_statistics() -> Iterator[None]:
    """Inside this context, `fully_shard` makes each layer with running statistics a separate unit in fp32.

    `accelerator.prepare` has no setting for this, but it looks up `fully_shard` when it runs; a canary test watches
    that. Costs a small all-gather for each such layer in the forward pass.
    """
    import torch.distributed.fsdp as fsdp

    original: Any = fsdp.fully_shard
    full_precision = fsdp.MixedPrecisionPolicy(cast_forward_inputs=False)  # bf16 in and out, as in autocast

    @functools.wraps(original)
    def fully_shard(module: Any, **kwargs: Any) -> Any:
        units = [module] if isinstance(module, nn.Module) else list(module)
        if getattr(kwargs.get("mp_policy"), "param_dtype", None) in (torch.bfloat16, torch.float16):
            for layer in [layer for unit in units for layer in unit.modules() if _has_statistics(layer)]:
                if not isinstance(layer, fsdp.FSDPModule):
                    original(layer, **{**kwargs, "mp_policy": full_precision, "reshard_after_forward": False})
            units = [unit for unit in units if not _has_statistics(unit)]
        if units:
            original(units if len(units) > 1 else units[0], **kwargs)
        return module

    fsdp.fully_shard = fully_shard
    try:
        yield
    finally:
        fsdp.fully_shard = original


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None and module.affine
