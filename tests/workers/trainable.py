"""Runs that freeze and unfreeze parameters between two steps, and the same as a plain loop.

Usage: accelerate launch trainable.py OUT [elsewhere]
"""

from __future__ import annotations

import json
import logging
import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, TrainingError
from trainloop.ranks import collectives

STEPS, BATCH, NUM_MICRO, DECAY = 10, 12, 2, 0.75
PLAN = {1: ["head.*"], 3: ["head.*", "body.2.*"], 5: ["head.bias", "body.0.*"], 7: ["*"], 9: ["body.*"]}
"""What is trained from a step on; `build_model` freezes the head's bias."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.head = nn.Linear(8, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Of all parameters, with weight decay, which a frozen one must not feel."""
    return torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.3)


def data() -> TensorDataset:
    x = torch.randn(BATCH * NUM_MICRO * STEPS, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.stack([x.sum(1), x[:, 0], x[:, 1] ** 2, x.prod(1)], 1))


class Schedule(BaseHook):
    """Changes what is trained as PLAN says: before the step, or after the one before."""

    def __init__(self, *, is_before: bool = False) -> None:
        self.is_before = is_before

    def on_before_train(self, trainer: Any) -> None:
        if not self.is_before and trainer.step == 0:
            trainer.set_trainable(PLAN[1])

    def on_before_step(self, trainer: Any) -> None:
        if self.is_before and trainer.step in PLAN:
            trainer.set_trainable(PLAN[trainer.step])

    def on_after_step(self, trainer: Any) -> None:
        if not self.is_before and trainer.step + 1 in PLAN:
            trainer.set_trainable(PLAN[trainer.step + 1])


class Recorder(BaseHook):
    """Of each step the mean loss over the ranks, and the norm."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_after_step(self, trainer: Any) -> None:
        loss = collectives.sum_over_ranks([trainer.step_info.loss.item()])[0] / collectives.world_size()
        self.rows.append([loss, trainer.step_info.grad_norm])


class Trainer(BaseTrainer):
    def __init__(self, folder: Path | None, *hooks: BaseHook, **options: Any) -> None:
        self.recorder = Recorder()
        self.more_hooks = list(hooks)
        options = {"max_steps": STEPS, "grad_clip": 0.5, "gradient_accumulation_steps": NUM_MICRO, **options}
        super().__init__(seed=0, workspace=folder, **options)

    def build_data_loader(self) -> Any:
        return DataLoader(data(), batch_size=BATCH // self.accelerator.num_processes)

    def build_model(self) -> nn.Module:
        return Model()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)

    def build_hooks(self) -> list[BaseHook]:
        return [*self.more_hooks, self.recorder, EmaHook(DECAY)]

    def forward(self, batch: Any) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), {}


def plain() -> tuple[list[list[float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same without the trainer: losses and norms, weights and their average."""
    model = Model()
    optimizer = optimizer_of(model)
    averages: dict[str, torch.Tensor] = {}
    rows = []
    batches = zip(*(tensor.split(BATCH) for tensor in data().tensors), strict=True)
    for step in range(1, STEPS + 1):
        for name, param in model.named_parameters():
            if step in PLAN:
                param.requires_grad_(any(fnmatchcase(name, pattern) for pattern in PLAN[step]))
        losses = []
        for _ in range(NUM_MICRO):
            x, y = next(batches)
            loss = nn.functional.mse_loss(model(x), y)
            (loss / NUM_MICRO).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        for name, param in model.named_parameters():
            weight = param.detach()
            averages[name] = averages[name].lerp(weight, 1 - DECAY) if step > 1 else weight.clone()
        rows.append([sum(losses) / NUM_MICRO, norm.item()])
    return rows, {name: param.detach() for name, param in model.named_parameters()}, averages


def digest(trainer: BaseTrainer) -> dict[str, list[Any]]:
    """Weights, averages and the optimizer's first moments, whole, as lists of exact numbers."""
    state = trainer.state_dict()
    moments = {name: one["exp_avg"] for name, one in state["training_state"]["optimizer"]["state"].items()}
    found = {}
    for kind, tensors in (("model", state["model"]), ("ema", state["ema"]), ("moments", moments)):
        for name, tensor in sorted(tensors.items()):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[f"{kind}/{name}"] = whole.flatten().tolist()
    return found


class OneRank(BaseHook):
    """Rank 1 unfreezes by itself; or the ranks unfreeze different parts."""

    def __init__(self, others: list[str] | None) -> None:
        self.others = others

    def on_after_step(self, trainer: Any) -> None:
        patterns = ["*"] if collectives.rank() == 1 else self.others
        if trainer.step == 2 and patterns:
            trainer.set_trainable(patterns)


def error_of(others: list[str] | None) -> list[Any]:
    trainer = Trainer(None, OneRank(others))
    try:
        trainer.train()
    except TrainingError as ex:
        return [type(ex).__name__, str(ex), trainer.step]
    raise AssertionError("no error")


def dtypes_of_gradients(trainer: BaseTrainer) -> list[str]:
    """Of each of FSDP2's units that has something to train: in which dtype it hands out gradients."""
    units: list[Any] = [module for module in trainer.model.modules() if hasattr(module, "_get_fsdp_state")]
    groups = list(filter(None, (unit._get_fsdp_state()._fsdp_param_group for unit in units)))
    trained = [group for group in groups if any(p.sharded_param.requires_grad for p in group.fsdp_params)]
    return [str(group._orig_dtype) for group in trained]


def resumed(out: Path, step: int, name: str) -> Trainer:
    """A run that went on from a checkpoint of the uninterrupted one."""
    hook = CheckpointingHook(99, load=out / f"whole/checkpoints/step_{step:07d}", trainable_only=True)
    trainer = Trainer(out / name, Schedule(), hook)
    trainer.train()
    return trainer


def run(out: Path) -> None:
    """Run all and write what this rank has seen: uninterrupted, and interrupted before a change takes effect."""
    trainer = Trainer(out / "whole", Schedule(), CheckpointingHook(2, keep_previous=99, trainable_only=True))
    trainer.train()
    results: dict[str, Any] = {"whole": [trainer.recorder.rows, digest(trainer)]}
    results["dtypes"] = dtypes_of_gradients(trainer)
    for step in (4, 6, 8):
        again = resumed(out, step, f"from {step}")
        results[f"from {step}"] = [trainer.recorder.rows[:step] + again.recorder.rows, digest(again)]
    before = Trainer(None, Schedule(is_before=True))
    before.train()
    results["before"] = [before.recorder.rows, digest(before)]
    if collectives.world_size() > 1:
        results["errors"] = [error_of(["head.*"]), error_of(None)]  # last: the others hear of it when rank 1 is gone
    (out / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(results))
    if collectives.world_size() > 1:
        os._exit(0)  # as after an exception that nobody has caught: without waiting for what another rank is in


def run_elsewhere(out: Path) -> None:
    """Go on with the run of a launch at another number of processes."""
    trainer = resumed(out, 4, "elsewhere")
    results = {"rows": trainer.recorder.rows, "digest": digest(trainer)}
    (out / f"elsewhere{trainer.accelerator.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    (run_elsewhere if len(sys.argv) > 2 else run)(Path(sys.argv[1]))
