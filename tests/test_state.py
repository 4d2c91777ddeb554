"""What is saved is what comes back: schedules, optimizers, modules and buffers of every kind, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from trainloop import BaseHook, BaseTrainer, CheckpointingHook

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer
from .workers import state as worker

STEPS = 8


class Recorder(BaseHook):
    """What the optimizer's groups hold after each step."""

    def __init__(self) -> None:
        self.groups: list[Any] = []

    def on_after_step(self, trainer: BaseTrainer) -> None:
        groups = trainer.optimizer.param_groups
        self.groups.append([{key: value for key, value in group.items() if key != "params"} for group in groups])


def adamw(trainer: SmallTrainer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainer.model.parameters(), lr=0.1)


def run(path: Path, load: Any = None, steps: int = STEPS, interval: int = 1, **kwargs: Any) -> SmallTrainer:
    """A run that saves every `interval` steps and keeps all checkpoints. Its recorder is `run(...).recorder`."""
    recorder = Recorder()
    hooks = kwargs.pop("hooks", [])
    saving = CheckpointingHook(interval, keep_interval=1, path=path, load=load)
    trainer = SmallTrainer(steps, hooks_=lambda self: [recorder, *hooks, saving], **kwargs)
    trainer.recorder = recorder  # type: ignore[attr-defined]
    trainer.train()
    return trainer


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS + 1, three_phase=True),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.MultiStepLR(o, [3]), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.MultiStepLR(o, [2])], [4]
    ),
    "SequentialLR of three": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, total_iters=2),
            lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
            lr_scheduler.OneCycleLR(o, 0.1, STEPS),
        ],
        [2, 5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_from_any_step(name: str, tmp_path: Path) -> None:
    """Killed after any step, every scheduler of torch gives the hyperparameters of the undisturbed run, and their
    types: betas stay a tuple.
    """
    kwargs = {"optimizer_": adamw, "lr_scheduler_": lambda self: SCHEDULES[name](self.optimizer)}
    whole = run(tmp_path / "whole", **kwargs).recorder.groups
    for step in range(1, STEPS):
        rest = run(tmp_path / f"{step}", load=tmp_path / "whole" / f"step_{step:07d}", interval=99, **kwargs)
        assert repr(rest.recorder.groups) == repr(whole[step:]), f"resumed after step {step}"


WORKER = REPOSITORY / "tests" / "workers" / "state.py"


@pytest.fixture(scope="module", params=["single", "ddp2", "fsdp3"])
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases in one launch of the form: how the undisturbed run and the resumed one ended, for each rank."""
    out = tmp_path_factory.mktemp(request.param)
    launch(WORKER, request.param, str(out))
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES[request.param])]


@pytest.mark.parametrize("case", worker.CASES)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(ends: list[dict[str, Any]], case: str) -> None:
    """Modules that save in their own way, extra state, optimizers with state of their own, buffers of every kind and
    frozen parameters that `forward` changes: bit for bit, with the average of the weights.
    """
    if case == "Fp8" and len(ends) == 2:
        pytest.skip("DDP shares buffers over gloo, which knows no fp8")
    for own in ends:
        if case == "Lookahead" and len(ends) == 3:
            assert "has a tensor at inner/state/" in own[case][0], own[case]
            assert "that FSDP2 has sharded" in own[case][0]
            continue
        assert len(own[case]) == 2, own[case]
        assert own[case][0] == own[case][1]
