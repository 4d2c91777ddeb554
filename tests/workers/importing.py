"""Loads what `foreign.py` has written, one after another, and writes what the run then has.

Usage: accelerate launch importing.py FOREIGN OUT name...
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.utils.data import DataLoader, TensorDataset

from tests.workers.foreign import make_lr_scheduler, make_model, make_optimizer
from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook


class Told(logging.Handler):
    """What the log says, on rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Trainer(BaseTrainer):
    def __init__(self, load: Path, ema: bool, **kwargs: Any) -> None:
        self.load, self.ema = load, EmaHook(0.5) if ema else None
        super().__init__(0, seed=77, **kwargs)

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(16, 6)), batch_size=4)

    def build_model(self) -> nn.Module:
        return make_model()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)

    def build_lr_scheduler(self) -> Any:
        return make_lr_scheduler(self.optimizer)

    def build_hooks(self) -> list[BaseHook]:
        hooks: list[BaseHook] = [CheckpointingHook(100, load=self.load)]
        return [*hooks, self.ema] if self.ema is not None else hooks

    def forward(self, batch: Any) -> Any:
        return self.model(batch[0]).pow(2).mean(), {}


def whole(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def main() -> None:
    foreign, out, *names = sys.argv[1:]
    told = Told()
    logger = logging.getLogger("importing")
    logger.setLevel(logging.INFO)
    logger.addHandler(told)
    for name in names:
        told.lines.clear()
        trainer = Trainer(Path(foreign, name), ema=name == "origin", logger=logger, workspace=Path(out, name))
        trainer.train()
        options = StateDictOptions(full_state_dict=True)
        optimizer = trainer.optimizer.optimizer
        after: dict[str, Any] = {"step": trainer.step, "log": list(told.lines)}
        after["sharded"] = any(hasattr(p, "device_mesh") for p in trainer.model.parameters())
        after["last_epoch"] = trainer.lr_scheduler.last_epoch
        has_state = bool(optimizer.state)
        if has_state:
            model, state = get_state_dict(trainer.model, optimizer, options=options)
        else:
            model, state = whole(trainer.live_model_state()), None
        tensors: dict[str, Any] = copy.deepcopy({"model": dict(model), "optimizer": state})  # they are the live ones
        if trainer.ema is not None:
            state_dict = trainer.state_dict()
            tensors["ema"], after["num_updates"] = (
                copy.deepcopy(whole(state_dict["ema"])),
                state_dict["ema_hook"]["num_updates"],
            )
        trainer.max_steps = trainer.step + 1
        trainer.train()
        after["went_on_to"] = trainer.step
        if trainer.accelerator.is_main_process:
            torch.save(tensors, Path(out, f"{name}.got"))
            Path(out, f"{name}.json").write_text(json.dumps(after))


if __name__ == "__main__":
    main()
