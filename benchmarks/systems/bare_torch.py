"""The bare torch loop: what all others are compared with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DistributedSampler

from ..tasks import CLIP, Task, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData

DEALS_SAMPLES = True
"""Sample after sample goes to another rank (`DistributedSampler`); Accelerate deals whole batches."""


def train(task: Task, data: TurnTakingData) -> nn.Module:
    plain = make_model(task.model).to(task.device)
    model: Any = torch.compile(plain) if task.is_compiled else plain
    sampling: dict[str, Any] = {}
    if task.is_distributed:
        torch.distributed.init_process_group("nccl" if task.device == "cuda" else "gloo")
        model = shard(model, task) if task.is_sharded else nn.parallel.DistributedDataParallel(model)
        sampling["sampler"] = DistributedSampler(data, shuffle=False)
    optimizer = make_optimizer(task, model.parameters())
    for num_drawn, (x, y) in enumerate(data.loader(**sampling), start=1):
        is_last = num_drawn % task.num_micro == 0
        if task.device != "cpu":
            x, y = x.to(task.device, non_blocking=True), y.to(task.device, non_blocking=True)
        if task.is_sharded:
            model.set_requires_gradient_sync(is_last)
        with nullcontext() if is_last or not task.is_ddp else model.no_sync():
            with torch.autocast(task.device, torch.bfloat16, enabled=task.precision == "bf16"):
                output = model(x)
            loss = loss_of(output, y)
            (loss / task.num_micro if task.num_micro > 1 else loss).backward()
        if is_last:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return plain


def shard(model: nn.Module, task: Task) -> nn.Module:
    """FSDP2: each layer of a transformer, and the rest."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh(task.device, (task.world_size,))
    for module in [*(m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)), model]:
        fully_shard(module, mesh=mesh)
    return model
