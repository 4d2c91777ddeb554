"""PyTorch-Ignite: an engine around a training step of one's own, without handlers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from torch import nn

from ..tasks import CLIP, Task, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData

DEALS_SAMPLES = True


def train(task: Task, data: TurnTakingData) -> nn.Module:
    if task.world_size > 1:
        idist.initialize("gloo")
    model = idist.auto_model(make_model(task.model))
    optimizer = idist.auto_optim(make_optimizer(task, model.parameters()))
    arguments = data.loader_arguments()
    arguments["batch_size"] *= task.world_size  # Ignite divides it
    loader = idist.auto_dataloader(data, **arguments)

    def step(engine: Engine, batch: Any) -> torch.Tensor:
        model.train()
        x, y = batch
        is_last = engine.state.iteration % task.num_micro == 0
        with nullcontext() if is_last or task.world_size == 1 else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
                output = model(x)
            loss = loss_of(output, y)
            (loss / task.num_micro if task.num_micro > 1 else loss).backward()
        if is_last:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    Engine(step).run(loader, max_epochs=1)
    return model.module if task.world_size > 1 else model
