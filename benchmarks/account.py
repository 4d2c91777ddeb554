"""What the account of a run costs a step: the ledger's record, and the note of a loss that was read."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer, CheckpointingHook

from .tasks import make_model
from .updates import Seconds

STEP, LEDGER = "a step without it", "the ledger"
_NUM_CALLS = 1000
_NUM_STEPS = 100


class _Tiny(BaseTrainer):
    def __init__(self, workspace: Path, hook: BaseHook) -> None:
        self.given = [hook, CheckpointingHook(10**9, load=None)]
        super().__init__(2 * _NUM_STEPS, workspace=workspace, seed=0, grad_clip=1.0, logger=logging.getLogger("quiet"))

    def build_data_loader(self) -> Any:
        return [torch.randn(32, 16) for _ in range(2 * _NUM_STEPS + 1)]

    def build_model(self) -> nn.Module:
        return make_model("tiny MLP")

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters())

    def build_hooks(self) -> list[BaseHook]:
        return self.given

    def forward(self, batch: Any) -> Any:
        return self.model(batch).pow(2).mean(), {}


class _Timer(BaseHook):
    """Measures the second half of the steps without the ledger, and the ledger alone after them."""

    def __init__(self) -> None:
        self.step = self.ledger = 0.0

    def on_after_step(self, trainer: BaseTrainer) -> None:
        (checkpointing,) = trainer.checkpointers
        account: Any = checkpointing._account  # type: ignore[attr-defined]
        if trainer.step == _NUM_STEPS:
            self._kept, account._ledger = account._ledger, None
            self._start = time.process_time()
        elif trainer.step == 2 * _NUM_STEPS:
            self.step = (time.process_time() - self._start) / _NUM_STEPS
            without = _seconds(lambda i: self._after_step(account))
            account._ledger = self._kept
            with_it = _seconds(lambda i: self._after_step(account))
            self.ledger = with_it - without + _seconds(lambda i: account.note_losses(10**6 + i, [1.0]))

    @staticmethod
    def _after_step(account: Any) -> None:
        account._last_step = -1
        account.after_step()


def _seconds(call: Callable[[int], None]) -> float:
    start = time.process_time()
    for i in range(_NUM_CALLS):
        call(i)
    return (time.process_time() - start) / _NUM_CALLS


def ledger(num_rounds: int) -> Seconds:
    """CPU seconds of a tiny step without the ledger, and of the ledger alone, by round."""
    seconds: Seconds = {STEP: [], LEDGER: []}
    for _ in range(num_rounds):
        timer = _Timer()
        with tempfile.TemporaryDirectory() as folder:
            _Tiny(Path(folder), timer).train()
        seconds[STEP].append(timer.step)
        seconds[LEDGER].append(timer.ledger)
    return seconds
