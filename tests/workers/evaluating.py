"""Loads weights and evaluates them without a training, on any number of ranks, and writes what each rank found.

Usage: accelerate launch evaluating.py FOLDER NAME
Or: accelerate launch -m trainloop evaluate tests.workers.evaluating:make_trainer CHECKPOINT, with the workspace in
TRAINLOOP_TEST_WORKSPACE.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, EvaluationHook
from trainloop.checkpoint import BestK, Checkpoint

NUM_SAMPLES = 27  # seven batches of four: divisible by neither two nor three, and the last one is not full


def samples(num: int = NUM_SAMPLES) -> torch.Tensor:
    """Num x 3: noise, and the sample's number twice."""
    noise = torch.randn(num, generator=torch.Generator().manual_seed(1))
    return torch.stack([noise, torch.arange(num).float(), torch.arange(num).float()], 1)


class Trainer(BaseTrainer):
    """A model of one input on the noise; each sample knows its number."""

    with_hooks: tuple[BaseHook, ...] = ()

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(samples()), batch_size=3, shuffle=True)

    def build_eval_data_loader(self) -> Any:
        return DataLoader(TensorDataset(samples()), batch_size=4)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return list(self.with_hooks)

    def forward(self, batch: Any) -> Any:
        return (self.model(batch[0][:, :1]) - 1).pow(2).mean(), {}


def make(*hooks: BaseHook, max_steps: int = 4, **kwargs: Any) -> Trainer:
    trainer = Trainer(max_steps, seed=3, **kwargs)
    trainer.with_hooks = hooks
    return trainer


def make_trainer() -> Trainer:
    """The one of `python -m trainloop evaluate`."""
    hooks = EvaluationHook(1), CheckpointingHook(1, keep=[BestK("val/loss", 4)]), EmaHook(0.9)
    return make(*hooks, workspace=os.environ["TRAINLOOP_TEST_WORKSPACE"])


def whole(tensor: Any) -> Any:
    """A tensor without its shards, as nested lists. Call on every rank."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().tolist()


def loaded_weights(folder: Path) -> dict[str, Any]:
    """Whether each group of each checkpoint is what the model has after `load_weights`, and its loss."""
    found: dict[str, Any] = {}
    trainer = make(CheckpointingHook(1, path=folder))
    for path in sorted(folder.glob("step_*")):
        for ema in (None, "ema"):
            loss = trainer.evaluate()["loss"]  # FSDP2 now holds gathered weights, which must not be used again
            assert trainer.load_weights(int(path.name[5:]), ema=ema) == path
            checkpoint = Checkpoint.open(path)
            described = checkpoint.tensors(ema or "model").items()
            saved = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described}
            checkpoint.read_into(ema or "model", saved)
            state = trainer.live_model_state()
            differing = [name for name in saved if whole(state[name]) != saved[name].tolist()]
            loss = trainer.evaluate()["loss"]
            found[f"{path.name} {ema}"] = {"differing": differing, "loss": loss}
    return found


def main(folder: Path, name: str) -> None:
    os.environ["TRAINLOOP_TEST_WORKSPACE"] = str(folder / name)
    trainer = make_trainer()
    trainer.train()
    rank = trainer.accelerator.process_index
    result = {"loaded": loaded_weights(folder / name / "checkpoints"), "last": trainer.evaluate()["loss"]}
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
