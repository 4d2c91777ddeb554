"""Runs in which the ranks come to differ, one after another in one launch, and writes what each rank was told.

Usage: accelerate launch agreement.py OUT scenario...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer

STEPS = 6


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)
        self.unused = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6).requires_grad_(False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(self.norm(x)).tanh()
        return y

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(z)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


class Trainer(BaseTrainer):
    hook: BaseHook | None = None
    bypasses = False
    scale = 0.0
    rate = 1e-2
    norms: Norms
    used_on: tuple[int, ...] = ()
    in_forward = in_eval_mode = is_whole = uses_not = ignores = False

    def build_data_loader(self) -> Any:
        samples = torch.randn(48, 6) if self.rate else torch.randn(1, 6).expand(48, 6)
        return DataLoader(TensorDataset(samples), batch_size=2)

    def build_model(self) -> nn.Module:
        model = Encoder()
        model.inner.requires_grad_(not isinstance(self.hook, Unfreeze))
        model.unused.requires_grad_(self.uses_not)
        if self.ignores:
            names = ["unused.weight", "unused.bias"]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        model.norm.train(not (self.in_eval_mode or self.rate == 0))
        return model.eval() if self.is_whole else model

    def build_optimizer(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=self.rate, weight_decay=0.0)

    def build_grad_scaler(self) -> Any:
        return torch.amp.GradScaler("cpu", init_scale=self.scale) if self.scale else None

    def build_hooks(self) -> list[BaseHook]:
        return [self.norms] if self.hook is None else [self.norms, self.hook]

    def forward(self, batch: Any) -> Any:
        model = self.unwrapped_model
        assert isinstance(model, Encoder)
        caller: Any = model if self.bypasses else self.model
        parts = self.bypasses or self.forward_methods
        y = caller.decode(caller.encode(batch[0])) if parts else self.model(batch[0])
        loss = (y - batch[0].sum(1, keepdim=True)).pow(2).mean()
        if self.in_forward:
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        if self.uses_not and self.accelerator.process_index in self.used_on:
            loss = loss + model.unused(batch[0][:, :2]).mean()
        return loss, {}


class Norms(BaseHook):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.values.append(trainer.step_info.grad_norm)


class AtStepThree(BaseHook):
    def on_before_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 3:
            self.act(trainer)

    def act(self, trainer: BaseTrainer) -> None:
        raise NotImplementedError


class Unfreeze(AtStepThree):
    def act(self, trainer: BaseTrainer) -> None:
        trainer.unwrapped_model.inner.requires_grad_(True)  # type: ignore[operator, union-attr]


class Accumulate(AtStepThree):
    def act(self, trainer: BaseTrainer) -> None:
        trainer.gradient_accumulation_steps = 4


class OtherRate(AtStepThree):
    def act(self, trainer: BaseTrainer) -> None:
        if trainer.accelerator.process_index == 1:
            trainer.optimizer.param_groups[0]["lr"] = 0.5


class OtherData(AtStepThree):
    def act(self, trainer: BaseTrainer) -> None:
        if trainer.accelerator.process_index == 1:
            next(trainer._feed)


class AfterTheLastStep(BaseHook):
    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == STEPS and trainer.accelerator.process_index == 1:
            trainer.optimizer.param_groups[0]["lr"] = 0.5


def bypassed(trainer: Trainer) -> None:
    trainer.bypasses = True


def with_hook(cls: type[BaseHook]) -> Callable[[Trainer], None]:
    def prepare(trainer: Trainer) -> None:
        trainer.hook = cls()

    return prepare


def with_values(**values: Any) -> Callable[[Trainer], None]:
    return lambda trainer: vars(trainer).update(values)


def other_scale(trainer: Trainer) -> None:
    trainer.scale = 8.0 if trainer.accelerator.process_index else 16.0


SCENARIOS: dict[str, Callable[[Trainer], None]] = {
    "bypass": bypassed,
    "unfreeze": with_hook(Unfreeze),
    "rate": with_hook(OtherRate),
    "data": with_hook(OtherData),
    "last": with_hook(AfterTheLastStep),
    "scale": other_scale,
    "none": lambda trainer: None,
    "in forward": with_values(in_forward=True),
    "backbone": with_values(in_eval_mode=True),
    "whole": with_values(is_whole=True),
    "accumulate": with_values(rate=0.0, hook=Accumulate()),
    "methods": with_values(forward_methods=("encode", "decode")),
    "unused": with_values(uses_not=True),
    "ignored": with_values(uses_not=True, ignores=True),
    "unused on one": with_values(uses_not=True, used_on=(0, 2)),
}


def main() -> None:
    out, *names = sys.argv[1:]
    for name in names:
        trainer = Trainer(STEPS, seed=3)
        trainer.norms = Norms()
        SCENARIOS[name](trainer)
        error = None
        try:
            trainer.train()
        except Exception as ex:
            error = f"{type(ex).__name__}: {ex}"
        model: Any = trainer.unwrapped_model
        result = {
            "error": error,
            "step": trainer.step,
            "norms": trainer.norms.values,
            "moved": bool(model.norm.running_mean.abs().sum() > 0),
            "trains": model.head.training,
        }
        Path(out, f"{name}.{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
