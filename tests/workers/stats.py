"""Logs records and images that only some ranks have, and writes what each rank was told.

Usage: accelerate launch stats.py OUT
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer, ImageFileLoggerHook, LoggingHook, ThroughputHook


class Log(BaseHook):
    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.throughput: list[Any] = []

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        if "train" in records:
            self.logged.append({key: records["train"][key] for key in ("rank", "only_1", "loss")})
        else:
            self.throughput.append(records["throughput"])


class Trainer(BaseTrainer):
    def build_data_loader(self) -> Any:
        return [torch.ones(1, 2)] * 4

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def build_optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.0)

    def build_hooks(self) -> list[BaseHook]:
        self.log_hook = Log()
        return [LoggingHook(interval=2), ThroughputHook(1, interval=2), ImageFileLoggerHook(), self.log_hook]

    def forward(self, batch: Any) -> Any:
        rank = self.accelerator.process_index
        time.sleep(0.05 * rank)
        records = {"rank": rank} | ({"only_1": torch.tensor(7.0)} if rank == 1 else {})
        return self.model(batch).sum() * 0 + rank * 5.0, records


def sharded(rank: int) -> torch.Tensor:
    """A 3 x 5 x 4 image of which rank 0 has the channels of level 0, rank 1 that of level 1."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    local = torch.full((2 - rank, 5, 4), rank, dtype=torch.uint8)
    mesh = init_device_mesh("cpu", (2,))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size([3, 5, 4]), stride=(20, 4, 1))


if __name__ == "__main__":
    trainer = Trainer(3, workspace=sys.argv[1], seed=0)
    trainer.train()
    rank = trainer.accelerator.process_index
    trainer.log_images({"rank": torch.full((2, 2), rank, dtype=torch.uint8), "sharded": sharded(rank)})
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(trainer.log_hook.logged))
    Path(sys.argv[1], f"throughput_{rank}.json").write_text(json.dumps(trainer.log_hook.throughput))
