"""pytorch-accelerated, with its bar and its printing left out."""

from __future__ import annotations

import os
from typing import Any

from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback, TerminateOnNaNCallback
from pytorch_accelerated.trainer import Trainer
from torch import nn

from ..tasks import CLIP, Task, batch_size, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData, as_it_is


class ClippingTrainer(Trainer):  # type: ignore[misc]
    """Its own option clips each element, and each micro-batch; the norm is clipped where the update is, by the method
    that is there to be overridden.
    """

    def optimizer_step(self) -> None:
        self._accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()


def train(task: Task, data: TurnTakingData) -> nn.Module:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": task.precision}
    model: Any = make_model(task.model)
    trainer = ClippingTrainer(
        model,
        loss_func=loss_of,
        optimizer=make_optimizer(task, model.parameters()),
        callbacks=(MoveModulesToDeviceCallback, TerminateOnNaNCallback),
    )
    trainer.train(
        train_dataset=data,
        num_epochs=1,
        per_device_batch_size=batch_size(task),
        gradient_accumulation_steps=task.num_micro,
        collate_fn=as_it_is,
        train_dataloader_kwargs={"shuffle": False, "num_workers": 0, "pin_memory": False},
    )
    return model
