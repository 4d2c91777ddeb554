"""Trains on a mixture with samples that can't be read, in one life and in two, and writes what each rank saw.

The first of the two lives looks ahead, as on a GPU.

Usage: accelerate launch data_sets.py OUT
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, LoggingHook
from trainloop.data import Mixture, SkipBadSamples, look_ahead

NUM_STEPS, KILLED_AT, BATCH = 12, 5, 2
BAD = range(0, 20, 7)
"""Of the source "a"."""


class Numbers(Dataset):  # type: ignore[type-arg]
    def __init__(self, first: int, bad: range) -> None:
        self.first, self.bad = first, bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise OSError("no such block")
        return self.first + index


class Recorder(BaseHook):
    """Keeps what `LoggingHook` logs of the data."""

    def __init__(self) -> None:
        self.logged: list[Any] = []

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self.logged.append(records["train"]["data"])


class Trainer(BaseTrainer):
    max_failures = 100
    num_ahead = 0

    def build_data_loader(self) -> Any:
        self.seen: list[int] = []
        sources = {"a": Numbers(0, BAD), "b": Numbers(100, range(0))}
        mixture = Mixture(sources, {"a": 0.75, "b": 0.25}, num_samples=30)
        return DataLoader(SkipBadSamples(mixture, self.max_failures), BATCH, shuffle=True, num_workers=2)

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1e-4)

    def build_hooks(self) -> list[BaseHook]:
        self.recorder = Recorder()
        saving = [CheckpointingHook(KILLED_AT)] if self.workspace is not None else []
        return [LoggingHook(1), self.recorder, *saving]

    def forward(self, batch: torch.Tensor) -> Any:
        self.seen += batch.tolist()
        if not look_ahead.HOSTS:
            begin = time.monotonic()
            while not self._feed._source.has_ready_batch() and time.monotonic() - begin < 60:
                time.sleep(0.002)
            self.num_ahead += self._feed.can_look_ahead
        return self.model(batch[:, None].float()).mean(), {}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def life(max_steps: int, workspace: Path | None, looks_ahead: bool = False) -> dict[str, Any]:
    look_ahead.HOSTS = set() if looks_ahead else {"cpu"}
    lines = Lines()
    logging.getLogger("trainloop").addHandler(lines)
    trainer = Trainer(max_steps, seed=1, workspace=workspace)
    trainer.train()
    logging.getLogger("trainloop").removeHandler(lines)
    return {
        "seen": trainer.seen,
        "num_ahead": trainer.num_ahead,
        "logged": trainer.recorder.logged,
        "skipped": [line for line in lines.lines if "could not be read" in line],
        "weights": [param.flatten().tolist() for param in trainer.model.parameters()],
    }


def main() -> None:
    out = Path(sys.argv[1])
    results: dict[str, Any] = {"whole": life(NUM_STEPS, None), "lives": []}
    for max_steps in (KILLED_AT, NUM_STEPS):
        results["lives"].append(life(max_steps, out / "workspace", looks_ahead=max_steps == KILLED_AT))
    strict = Trainer(NUM_STEPS, seed=1)
    strict.max_failures = 1
    try:
        strict.train()
    except Exception as ex:
        results["error"] = [type(ex).__name__, str(ex), strict.step]
    (out / f"{strict.accelerator.process_index}.json").write_text(json.dumps(results))
    strict.accelerator.end_training()


if __name__ == "__main__":
    main()
