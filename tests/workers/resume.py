"""Trainers with everything that a resume must bring back, made where a life of a run begins."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, LoggingHook
from trainloop.checkpoint import FileSystem


class Noisy(Dataset):  # type: ignore[type-arg]
    """Sample i: its number, and values that are augmented by the process's generator."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(6, generator=generator) + 0.1 * torch.randn(6)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The same samples from a stream that knows its position."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        samples = Noisy()
        while self.position < len(samples):
            self.position += 1
            yield samples[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Waited(Noisy):
    """A worker that sends SIGTERM to the process that waits for it, with sample 20, and then takes its time."""

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if index == 20:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.3)
        return super().__getitem__(index)


class Again(BaseHook):
    """A second signal, when the first one was agreed on, or, after the save, while the run waits to exit."""

    def __init__(self, is_late: bool) -> None:
        self.seconds = 0.4 if is_late else 0.0

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        if trainer.control.agreed["exit_signal"]:
            if self.seconds:
                threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
            else:
                os.kill(os.getpid(), signal.SIGTERM)


class Full(BaseHook):
    """On rank 1 files cannot grow while the save of step 4 is on its way."""

    def __init__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        if trainer.step == 4 and trainer.accelerator.process_index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, self.limits[1]))

    def on_before_step(self, trainer: BaseTrainer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)  # or what it prints would not fit either


class Raising(BaseHook):
    """Rank 1 alone fails in step 5, while the save of step 4, which takes its time, is on its way."""

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 4:
            write = FileSystem.write

            def slow(self: FileSystem, *args: Any) -> None:
                time.sleep(0.2)
                write(self, *args)

            FileSystem.write = slow  # type: ignore[method-assign]
        if trainer.step == 5 and trainer.accelerator.process_index == 1:
            raise MemoryError("on this rank only")


class StopOnRankOne(BaseHook):
    """Rank 1 alone asks for a stop, after step 5."""

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 5 and trainer.accelerator.process_index == 1:
            trainer.request_stop()


HOOKS: dict[str, Callable[[], BaseHook]] = {
    "again": lambda: Again(is_late=False),
    "again late": lambda: Again(is_late=True),
    "full": Full,
    "raising": Raising,
    "stop on rank 1": StopOnRankOne,
}


class Trainer(BaseTrainer):
    """Dropout, BatchNorm, AdamW, OneCycle, an interval of the log that no checkpoint ends."""

    data = "map"
    num_workers = 0
    checkpointing: dict[str, Any] = {}  # noqa: RUF012 - set on the instance

    def build_data_loader(self) -> Any:
        if self.data == "waited":
            return DataLoader(Waited(), batch_size=4, num_workers=1, prefetch_factor=1)
        if self.data == "stream":
            return DataLoader(Stream(), batch_size=4, num_workers=self.num_workers)
        return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=self.num_workers)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 16), nn.Linear(16, 1))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=200_000)

    def build_hooks(self) -> list[BaseHook]:
        more: list[BaseHook] = []
        if self.data in HOOKS:
            more = [HOOKS[self.data]()]
        return [LoggingHook(interval=5), CheckpointingHook(**{"interval": 2, **self.checkpointing}), *more]

    def forward(self, batch: Any) -> Any:
        _, x = batch
        loss = (self.model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        return loss, {"mse": loss.detach()}


def make_trainer(
    workspace: Path, *, data: str = "map", num_workers: int = 0, max_steps: int = 13, **checkpointing: Any
) -> Trainer:
    trainer = Trainer(max_steps, grad_clip=1.0, gradient_accumulation_steps=3, workspace=workspace, seed=9)
    trainer.data, trainer.num_workers, trainer.checkpointing = data, num_workers, checkpointing
    return trainer


def sample_ids(batch: Any, index: int = 0) -> Any:
    return batch[index]
