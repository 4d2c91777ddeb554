"""A non-finite gradient leaves no trace on a GPU either, and no memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer

from .. import test_non_finite as on_cpu
from ..launching import launch
from ..small import SmallTrainer
from ..workers.non_finite import INJECTIONS
from .devices import ON_GPU

CHECKS = (
    on_cpu.test_a_discarded_window_leaves_no_trace,
    on_cpu.test_every_rank_completes_the_window_and_counts_one_retry,
    on_cpu.test_a_limit_of_zero_raises_at_once,
    on_cpu.test_parameters_that_are_not_finite_raise_whatever_the_limit,
    on_cpu.test_a_loss_that_is_not_finite_is_no_reason_while_the_gradient_is,
    on_cpu.test_a_norm_that_overflows_is_no_non_finite_gradient,
    on_cpu.test_an_overflow_under_a_scaler_lowers_the_scale_and_is_not_counted,
    on_cpu.test_a_loss_scale_that_collapses_raises,
)
"""What the CPU's tests promise of the outcomes of one launch."""


@pytest.mark.gpu
def test_every_promise_of_the_cpu_holds(tmp_path: Path) -> None:
    """NaN in the batch, the loss or a gradient, Inf in one element; BatchNorm's statistics and other buffers are put
    back; limits, overflows and what ends a run: as on the CPU, bit for bit.
    """
    launch(on_cpu.WORKER, "single", str(tmp_path), env=ON_GPU)
    results = [json.loads((tmp_path / "0.json").read_text())]
    for check in CHECKS:
        check(results)
    on_cpu.test_the_limit_counts_retries_of_one_step(results, "single")


@pytest.mark.gpu
def test_a_discarded_window_leaves_no_trace_in_bf16(tmp_path: Path) -> None:
    """The same in mixed precision: parameters, statistics, optimizer state and learning rates, bit for bit."""
    precision = ["--mixed_precision", "bf16"]
    launch(on_cpu.WORKER, "single", str(tmp_path), *INJECTIONS, launch_args=precision, env=ON_GPU)
    results = [json.loads((tmp_path / "0.json").read_text())]
    on_cpu.test_a_discarded_window_leaves_no_trace(results)
    on_cpu.test_every_rank_completes_the_window_and_counts_one_retry(results)


@pytest.mark.gpu
def test_fifty_retries_hold_no_memory() -> None:
    """As much is allocated after a step with 50 discarded windows as after the step before it."""
    allocated: list[int] = []

    class Allocated(BaseHook):
        def on_after_step(self, trainer: BaseTrainer) -> None:
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())

    num_calls = 0

    def forward(self: SmallTrainer, batch: tuple[torch.Tensor]) -> object:
        nonlocal num_calls
        num_calls += 1
        is_bad = 4 <= num_calls < 54
        return self.model(batch[0]).mean() * (float("nan") if is_bad else 1.0), {}

    trainer = SmallTrainer(
        5,
        max_non_finite_grad_retries=50,  # without a limit the run ends after an epoch of them
        data_loader=lambda self: [(torch.ones(64, 256),)],
        model_=lambda self: nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.Linear(256, 1)),
        optimizer_=lambda self: torch.optim.AdamW(self.model.parameters()),
        hooks_=lambda self: [Allocated()],
        forward_=forward,
    )
    trainer.train()
    assert num_calls == 55
    assert allocated[3] == allocated[2] == allocated[1]
