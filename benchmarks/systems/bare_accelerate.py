"""The loop of Accelerate's documentation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from trainloop.setup.launch import rehearse_fsdp2_on_cpu

from ..tasks import CLIP, Task, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData


def train(task: Task, data: TurnTakingData) -> nn.Module:
    accelerator = Accelerator(
        cpu=task.device == "cpu", gradient_accumulation_steps=task.num_micro, mixed_precision=task.precision
    )
    rehearse_fsdp2_on_cpu(accelerator)  # on CPU processes, Accelerate would use DDP
    plain = make_model(task.model)
    model = torch.compile(plain) if task.is_compiled else plain
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(task, model.parameters()), data.loader())
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return plain
