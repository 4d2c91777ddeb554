"""Reading the norm after the update gives the same run, bit for bit, as reading it before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import BaseHook
from trainloop.step import update

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer
from .workers import read_last

WORKER = REPOSITORY / "tests" / "workers" / "read_last.py"


@pytest.mark.parametrize("form", ["single", "ddp2", "fsdp2"])
def test_reading_last_is_reading_first(form: str, tmp_path: Path) -> None:
    """Fused Adam, AdamW, SGD with momentum and Adagrad: windows that are discarded (the first of a run among them),
    norms that overflow, a grad scaler and an error end with the same weights, buffers, optimizer state, events,
    learning rates and log lines.
    """
    launch(WORKER, form, str(tmp_path), form)
    for rank in range(NUM_PROCESSES[form]):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(results) == 2 * len(read_last.runs(form))
        for case in [f"{optimizer} {case}" for optimizer, case in read_last.runs(form)]:
            first, last = results[f"{case} first"], results[f"{case} last"]
            assert (first.pop("reads_last"), last.pop("reads_last")) == (False, True)
            assert last == first, f"{case} on rank {rank}"
            retries = sum(event[0] == "retry" for event in last["events"])
            assert retries == {"batch": 1, "twice-at-the-first-step": 2, "late": 1}.get(case.split()[1], 0), case
            assert ("error" in last) == case.endswith("limit")


class LooksAtGradients(BaseHook):
    def on_before_optimizer_step(self, trainer: Any) -> None:
        pass


class OwnStep(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def adamw(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **kwargs)


def with_step_hook(params: Any) -> torch.optim.Optimizer:
    optimizer = adamw(params)
    optimizer.register_step_post_hook(lambda *args: None)
    return optimizer


def with_replaced_step(params: Any) -> torch.optim.Optimizer:
    optimizer, calls = adamw(params), []
    step = optimizer.step
    optimizer.step = lambda closure=None: calls.append(step(closure))  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "hooks", "grad_clip", "expected"),
    [
        (adamw, [], 1.0, True),
        (adamw, [BaseHook()], None, True),
        (adamw, [LooksAtGradients()], None, False),
        (adamw, [], 1e-7, False),
        (torch.optim.AdamW, [], None, False),
        (lambda params: OwnStep(params, fused=True), [], None, False),
        (with_step_hook, [], None, False),
        (with_replaced_step, [], None, False),
    ],
)
def test_the_norm_is_read_last_only_where_nothing_can_tell(
    optimizer: Any, hooks: list[BaseHook], grad_clip: float | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that looks at the gradient, an optimizer that cannot skip or does more than its own step: read first."""
    monkeypatch.setattr(update, "DEVICES", {"cpu"})
    trainer = SmallTrainer(
        1, grad_clip=grad_clip, optimizer_=lambda self: optimizer(self.model.parameters()), hooks_=lambda self: hooks
    )
    trainer.train()
    assert trainer._update.reads_last is expected


def test_the_cpu_reads_first() -> None:
    """There the host waits for nothing, and clips only where it must."""
    trainer = SmallTrainer(1, optimizer_=lambda self: adamw(self.model.parameters()))
    trainer.train()
    assert not trainer._update.reads_last


def test_a_schedule_may_wrap_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate schedule replaces `optimizer.step` by one that counts: the norm is read last all the same."""
    monkeypatch.setattr(update, "DEVICES", {"cpu"})
    trainer = SmallTrainer(
        2,
        model_=lambda self: nn.Linear(3, 2),
        optimizer_=lambda self: adamw(self.model.parameters()),
        lr_scheduler_=lambda self: torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5),
    )
    trainer.train()
    assert trainer._update.reads_last
