"""Lightning, with its bar, logger and checkpoints switched off."""

from __future__ import annotations

import os
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DistributedSampler

from ..tasks import CLIP, Task, loss_of, make_model, make_optimizer
from ..turns import TurnTakingData

DEALS_SAMPLES = True


class Module(lightning.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.plain = make_model(task.model)
        self.inner: Any = torch.compile(self.plain) if task.is_compiled else self.plain

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return loss_of(self.inner(x), y)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.task.optimizer == "fused adamw":  # for which Lightning refuses its own clipping in mixed precision
            nn.utils.clip_grad_norm_(self.plain.parameters(), CLIP)
        else:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.task, self.parameters())


def train(task: Task, data: TurnTakingData) -> nn.Module:
    module = Module(task)
    trainer = lightning.Trainer(
        accelerator="gpu" if task.device == "cuda" else "cpu",
        devices=task.world_size,
        strategy="ddp" if task.world_size > 1 else "auto",
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        max_epochs=1,
        accumulate_grad_batches=task.num_micro,
        gradient_clip_val=None if task.optimizer == "fused adamw" else CLIP,
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=os.devnull,
    )
    sampling: dict[str, Any] = {}
    if task.world_size > 1:  # Lightning's own shuffles
        sampling["sampler"] = DistributedSampler(data, task.world_size, trainer.global_rank, shuffle=False)
    trainer.fit(module, data.loader(**sampling))
    return module.plain
