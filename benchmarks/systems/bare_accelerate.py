"""The loop of Accelerate's documentation."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from ..tasks import CLIP, Task, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData


def train(task: Task, data: TurnTakingData) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.num_micro, mixed_precision=task.precision)
    model = make_model(task.model)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(task, model.parameters()), data.loader())
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    unwrapped: nn.Module = accelerator.unwrap_model(model)
    return unwrapped
