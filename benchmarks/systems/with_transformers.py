"""transformers' Trainer, with its bar, logs and checkpoints switched off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..tasks import CLIP, Task, batch_size, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData


class Model(nn.Module):
    """Returns its loss, as the Trainer wants it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.inner = make_model(task.model)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(self.inner(x), labels)}


def collate(batch: Any) -> dict[str, torch.Tensor]:
    return {"x": batch[0], "labels": batch[1]}


def train(task: Task, data: TurnTakingData) -> nn.Module:
    model = Model(task)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(data.folder),
            use_cpu=True,
            bf16=task.precision == "bf16",
            per_device_train_batch_size=batch_size(task),
            gradient_accumulation_steps=task.num_micro,
            num_train_epochs=1,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=collate,
        train_dataset=data,
        optimizers=(make_optimizer(task, model.parameters()), None),
    )
    trainer.train()
    return model.inner
