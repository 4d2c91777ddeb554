"""A frozen backbone in bf16 with a trained adapter, saved with and without `trainable_only`, stopped and started again.

Usage: accelerate launch adapters.py OUT
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.workers.non_finite import digest
from trainloop import BaseHook, BaseTrainer, CheckpointError, CheckpointingHook, EmaHook
from trainloop.checkpoint.fingerprint import fingerprints

STEPS, STOP = 6, 3


class Model(nn.Module):
    """backbone, twin: frozen, one module under two names unless it is sharded; teacher: frozen, and a hook moves it."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.backbone = nn.Linear(16, 33)
        self.backbone.to(torch.bfloat16)
        self.twin = self.backbone if is_tied else nn.Linear(16, 33).to(torch.bfloat16)
        self.student, self.teacher = nn.Linear(16, 33), nn.Linear(16, 33)
        self.register_buffer("seen", torch.zeros(1))
        for part in (self.backbone, self.twin, self.teacher):
            part.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        frozen = self.backbone(x.to(torch.bfloat16)) + self.twin(x.to(torch.bfloat16))
        return frozen.float() + self.student(x) + self.teacher(x)


class Follow(BaseHook):
    """The teacher follows the student."""

    @torch.no_grad()
    def on_after_optimizer_step(self, trainer: Any) -> None:
        model = trainer.unwrapped_model
        model.teacher.weight.lerp_(model.student.weight, 0.5)


class Trainer(BaseTrainer):
    def __init__(
        self, folder: Path, max_steps: int = STEPS, seed_of_base: int = 1, is_tied: bool | None = None, **options: Any
    ) -> None:
        self.seed_of_base, self.is_tied, self.options = seed_of_base, is_tied, options
        self.losses: list[float] = []
        super().__init__(max_steps, seed=0, workspace=folder)

    def build_data_loader(self) -> Any:
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x), batch_size=4 // self.accelerator.num_processes)

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        model = Model(self.is_tied if self.is_tied is not None else not self.accelerator.is_fsdp2)
        torch.manual_seed(self.seed_of_base)
        nn.init.normal_(model.backbone.weight)
        return model

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return [Follow(), EmaHook(0.5), CheckpointingHook(100, keep_previous=9, **self.options)]

    def forward(self, batch: Any) -> Any:
        loss = self.model(batch[0]).pow(2).mean()
        self.losses.append(loss.item())
        return loss, {}


def end(trainer: Trainer) -> list[Any]:
    trainer.train()
    averages = [average.sum().item() for average in trainer.hooks[1]._averages]  # type: ignore[attr-defined]
    return [digest(trainer), trainer.unwrapped_model.seen.item(), averages]


class Helper(nn.Module):
    """Two blocks, BatchNorm among them, and a method other than forward."""

    forward_methods = ("encode",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm = nn.BatchNorm1d(16)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.norm(x)


class Helped(Trainer):
    """Trains on what a frozen helper makes of the batch."""

    def build_frozen(self) -> Any:
        torch.manual_seed(5 + self.accelerator.process_index)  # a script's mistake: another one on each rank
        return {"encoder": Helper(), "wide": nn.Linear(16, 16)}

    def forward(self, batch: Any) -> Any:
        helpers: Any = self.frozen
        x = helpers["encoder"].encode(batch[0].to(torch.bfloat16)).float()
        return super().forward([helpers["wide"](x)])


def helped(folder: Path, is_sharded: bool) -> list[Any]:
    """The losses of three steps with helpers, and what the helpers are."""
    trainer = Helped(folder, 3, trainable_only=True)
    trainer.frozen_dtype = {"encoder": torch.bfloat16}
    trainer.shard_frozen = is_sharded
    trainer.train()
    helpers: Any = trainer.frozen
    params = [param for helper in helpers.values() for param in helper.parameters()]
    whole: list[Any] = [param.full_tensor() if hasattr(param, "full_tensor") else param for param in params]
    about = [
        type(params[0]).__name__,
        sorted({str(param.dtype) for param in params}),
        sum(map(torch.sum, whole)).item(),
    ]
    is_idle = not any(param.requires_grad for param in params) and not any(h.training for h in helpers.values())
    return [trainer.losses, about, is_idle, len(trainer.state_dict()["model"])]


def run(out: Path) -> None:
    """Run all, and write what each rank has seen."""
    results: dict[str, Any] = {"whole": end(Trainer(out / "whole"))}
    end(Trainer(out / "small", STOP, trainable_only=True))
    try:
        Trainer(out / "small", seed_of_base=2).train()
    except CheckpointError as ex:
        results["other base"] = str(ex)
    again = Trainer(out / "small", trainable_only=True)
    results["small"], results["losses"] = end(again), again.losses
    results["fingerprints"] = fingerprints([again.named_parameters()["backbone.weight"]])
    # A base that was loaded and not built is no base that a restart could build.
    loaded = Trainer(out / "loaded", 1, trainable_only=True)
    loaded._build()
    with torch.no_grad():
        loaded.unwrapped_model.backbone.bias.add_(1)
    loaded.train()
    results["helped"] = [helped(out / f"helped {is_sharded}", is_sharded) for is_sharded in (False, True)]
    (out / f"{again.accelerator.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    run(Path(sys.argv[1]))
