"""Trains with fused optimizers twice, reading the norm before the update and after it, and writes what each rank saw.

Usage: accelerate launch read_last.py OUT form
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.workers import non_finite
from trainloop import BaseHook, BaseTrainer
from trainloop.step import update

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-2), fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, fused=True),
}
CASES: dict[str, dict[str, Any]] = {
    "healthy": {},
    "clipped": {"grad_clip": 0.5},
    "batch": {"kind": "batch", "grad_clip": 0.5},
    "twice-at-the-first-step": {"kind": "sqrt", "bad_step": 1, "num_bad_windows": 2, "grad_clip": 1e9},
    "huge": {"kind": "huge", "max_steps": non_finite.BAD_STEP},
    "huge-clipped": {"kind": "huge", "max_steps": non_finite.BAD_STEP, "grad_clip": 0.5},
    "limit": {"kind": "loss", "max_non_finite_grad_retries": 0},
    "scaler": {"scale": 2.0**127, "grad_clip": 0.5},
    "late": {"grad_clip": 0.5},  # one parameter has its first gradient in a window that is discarded
}
FEW = ("batch", "huge-clipped", "scaler")


def runs(form: str) -> list[tuple[str, str]]:
    """Pairs of an optimizer and a case. torch has no fused SGD and Adagrad for sharded parameters, its fused SGD takes
    no late parameter, and DDP wants a gradient of every parameter.
    """
    pairs = [(o, c) for o in OPTIMIZERS for c in CASES if o in ("adamw", "sgd") or c in FEW]
    if form == "fsdp2":
        pairs = [(o, c) for o, c in pairs if o in ("adamw", "adam")]
    return [(o, c) for o, c in pairs if c != "late" or (form, o) == ("single", "adamw")]


class Recorder(non_finite.Events):
    """Every event of a step but the one that makes the host read first."""

    def on_before_step(self, trainer: BaseTrainer) -> None:
        super().on_before_step(trainer)
        self.events.append(["before step", trainer.step])

    def on_after_optimizer_step(self, trainer: BaseTrainer) -> None:
        lr = float(trainer.optimizer.param_groups[0]["lr"])
        self.events.append(["after update", trainer.step, trainer.step_info.grad_norm, lr])

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.lr = float(self.lr)
        super().on_after_step(trainer)


class LateNet(non_finite.Net):
    """`scale` has a gradient in the window that is discarded, and never before or after it."""

    def forward(self, x: torch.Tensor, is_zero: bool, spike: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        y, aux = super().forward(x, is_zero, spike)
        return y, aux if is_zero else torch.zeros(())


class Trainer(non_finite.Trainer):
    def __init__(self, optimizer: str, case: str, **kwargs: Any) -> None:
        self.make_optimizer, self.is_late = OPTIMIZERS[optimizer], case == "late"
        if (scale := kwargs.pop("scale", None)) is not None:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        kind = "sqrt" if self.is_late else kwargs.pop("kind", None)
        super().__init__(kind, (0,), kwargs.pop("num_bad_windows", 1), **kwargs)

    def build_model(self) -> Any:
        torch.manual_seed(2)
        return LateNet() if self.is_late else non_finite.Net()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.model.parameters())

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def build_hooks(self) -> list[BaseHook]:
        self.recorder = Recorder()
        return [self.recorder]


def main() -> None:
    log: list[str] = []
    logger = logging.getLogger("worker")
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)

    results: dict[str, Any] = {}
    out, form = Path(sys.argv[1]), sys.argv[2]
    for reads_last in (False, True):
        update.DEVICES = {"cpu"} if reads_last else set()
        for optimizer, case in runs(form):
            kwargs = dict(CASES[case])
            non_finite.BAD_STEP = kwargs.pop("bad_step", 3)
            trainer = Trainer(optimizer, case, logger=logger, **kwargs)
            result = non_finite.outcome(trainer, log)
            result["reads_last"] = trainer._update.reads_last
            results[f"{optimizer} {case} {'last' if reads_last else 'first'}"] = result
            trainer.accelerator.scaler = None  # the next trainer builds its own Accelerator, but let no trace stay
    (out / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
