"""Ranks that have diverged by one bit try to save.

Usage: accelerate launch diverged.py OUT
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.small import SmallTrainer
from trainloop import BaseHook, BaseTrainer, CheckpointError, CheckpointingHook
from trainloop.checkpoint import CheckpointStore


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.out = nn.Linear(3, 40), nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.b(self.a(x).tanh())))


def nudge(tensor: Any) -> None:
    """Change one bit of the first element that this rank holds, if it holds any."""
    local = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
    if local.numel():
        local.view(torch.int32).view(-1)[0] ^= 1


def weights(trainer: BaseTrainer, rank: int) -> None:
    if rank in (1, 2):
        nudge(trainer.named_parameters()["a.weight" if rank == 1 else "b.weight"])


def optimizer(trainer: BaseTrainer, rank: int) -> None:
    if rank == 2:
        nudge(trainer.optimizer.state[trainer.named_parameters()["out.weight"]]["exp_avg"])


def replica(trainer: BaseTrainer, rank: int) -> None:
    if rank == 3:
        nudge(trainer.named_parameters()["b.weight"])


def statistics(trainer: BaseTrainer, rank: int) -> None:
    trainer.unwrapped_model.norm.running_mean += rank


CASES: dict[str, Callable[[BaseTrainer, int], None]] = {
    case.__name__: case for case in (weights, optimizer, replica, statistics)
}


class Diverge(BaseHook):
    def __init__(self, case: str) -> None:
        self.case = case

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 2:
            CASES[self.case](trainer, trainer.accelerator.process_index)


def main() -> None:
    out = Path(sys.argv[1])
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    for case in CASES:
        folder = out / case
        trainer = SmallTrainer(
            2,
            data_loader=lambda self: torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(torch.randn(64, 3, generator=torch.Generator().manual_seed(0))), 4
            ),
            model_=lambda self: Net(),
            optimizer_=lambda self: torch.optim.AdamW(self.model.parameters()),
            hooks_=lambda self, case=case, folder=folder: [
                Diverge(case),
                CheckpointingHook(1, keep_previous=3, path=folder, max_failures=0),
            ],
        )
        try:
            trainer.train()
            error = ""
        except CheckpointError as ex:
            error = str(ex)
        steps = [info.step for info in CheckpointStore(folder).checkpoints()]
        results[case] = {"error": error, "steps": steps}
    (out / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
