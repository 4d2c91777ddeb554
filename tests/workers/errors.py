"""Wrong uses that need a launch of several processes: each is tried in turn, and what the user sees is written down.

Usage: accelerate launch errors.py OUT
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer


class Small(BaseTrainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, seed=0, **kwargs)

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=2)

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def build_optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def forward(self, batch: Any) -> Any:
        return self.model(batch[0]).mean(), {}

    @property
    def rank(self) -> int:
        return self.accelerator.process_index


class NoneOnOneRank(Small):
    def forward(self, batch: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return (None, {}) if self.rank == 1 and self.calls == 1 else super().forward(batch)


class SomeWeights(Small):
    def batch_weight(self, batch: Any) -> Any:
        return 1.0 if self.rank == 0 else None


class BadWeight(Small):
    def batch_weight(self, batch: Any) -> Any:
        return 1.0 if self.rank == 0 else -1.0


class OwnLoader(Small):
    def build_data_loader(self) -> Any:
        class Mine(DataLoader):  # type: ignore[type-arg]
            def __iter__(self) -> Any:
                return super().__iter__()

        return Mine(TensorDataset(torch.randn(8, 3)), batch_size=2)


class TooSmall(Small):
    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(3, 3)), batch_size=2, drop_last=True)


class NoneForEver(Small):
    def forward(self, batch: Any) -> Any:
        return None, {}


class StateFirst(Small):
    def __init__(self) -> None:
        PartialState()
        try:
            super().__init__()
        finally:
            AcceleratorState._reset_state(True)


class PluginOfTheScript(Small):
    def __init__(self) -> None:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, min_num_params=1, auto_wrap_policy="size_based_wrap")
        try:
            super().__init__(accelerator=Accelerator(fsdp_plugin=plugin))
        finally:
            os.environ.pop("ACCELERATE_USE_FSDP")
            AcceleratorState._reset_state(True)


def main() -> None:
    messages = {}
    warnings.simplefilter("ignore")
    for cls in (StateFirst, PluginOfTheScript, NoneOnOneRank, SomeWeights, BadWeight, OwnLoader, TooSmall, NoneForEver):
        try:
            cls().train()
        except Exception as ex:
            messages[cls.__name__] = f"{type(ex).__name__}: {ex}"
    trainer = Small()
    trainer.train()
    messages["afterwards"] = str(trainer.step)
    Path(sys.argv[1], f"{trainer.rank}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main()
