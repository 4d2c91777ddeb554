"""What the hooks measure on a GPU is what torch and a clock say, and a run needs no more memory than a bare loop."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainloop import BaseHook, BaseTrainer, CudaMaxMemoryHook, ThroughputHook
from trainloop.hooks.throughput import PEAK_FLOPS

from ..small import SmallTrainer
from .devices import on_each_device, synchronize

INTERVAL = 20


@pytest.mark.gpu
def test_peak_memory_is_measured_in_gib() -> None:
    """`CudaMaxMemoryHook` writes what torch counts: the peak of the step, and not what a later step needs less of."""
    peaks: list[float | None] = []

    class Peaks(BaseHook):
        def on_after_step(self, trainer: BaseTrainer) -> None:
            peaks.append(trainer.step_info.max_memory)

    extra = 2**28

    def forward(self: SmallTrainer, batch: Any) -> Any:
        if self.step == 2:
            torch.empty(extra, dtype=torch.uint8, device="cuda")
        return self.model(batch[0]).pow(2).mean(), {}

    trainer = SmallTrainer(3, forward_=forward, hooks_=lambda self: [CudaMaxMemoryHook(), Peaks()])
    trainer.train()
    first, second, third = (peak for peak in peaks if peak is not None)
    assert third == torch.cuda.max_memory_allocated() / 2**30 > 0
    assert second - first == pytest.approx(extra / 2**30, rel=0.05)
    assert third == pytest.approx(first, rel=0.5)


@on_each_device
def test_mfu_is_the_operations_over_the_time_and_the_peak(device: str, record_property: Any) -> None:
    """The operations of a step, counted by hand, are those that torch counts; `mfu` is their share of the peak over the
    time that the steps took, which another clock measures.
    """
    width, batch_size, num_layers = (4096, 2048, 4) if device == "cuda" else (64, 32, 4)
    # Forward, gradient of the weights, gradient of the input (which the first layer's needs none of).
    by_hand = 2.0 * batch_size * width * width * (3 * num_layers - 1)
    logged: list[dict[str, float]] = []

    class Clock(BaseHook):
        """Measures the same steps from outside."""

        seconds = 0.0

        def on_before_step(self, trainer: BaseTrainer) -> None:
            self.start = time.perf_counter()

        def on_after_step(self, trainer: BaseTrainer) -> None:
            self.seconds += time.perf_counter() - self.start
            if trainer.step == INTERVAL:
                self.seconds = 0.0  # of the second interval, when everything is warm

        def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
            logged.append(records["throughput"])

    clock = Clock()
    peak = None if device == "cuda" else 1e12
    hook = ThroughputHook(flops_per_step=by_hand, interval=INTERVAL, peak_flops=peak)
    trainer = SmallTrainer(
        2 * INTERVAL,
        device=device,
        mixed_precision="bf16",
        data_loader=lambda self: [(torch.randn(batch_size, width),)],
        model_=lambda self: nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers))),
        optimizer_=lambda self: torch.optim.SGD(self.model.parameters(), lr=1e-9),
        hooks_=lambda self: [hook, clock],
    )
    trainer.train()
    synchronize(device)
    counter = FlopCounterMode(display=False)
    with counter:
        trainer.forward((torch.randn(batch_size, width, device=device),))[0].backward()
    assert counter.get_total_flops() == by_hand
    if device == "cuda":
        name = torch.cuda.get_device_name()
        known = [value for words, value in PEAK_FLOPS.items() if words in name]
        if not known:
            pytest.skip(f"the peak of {name} is not known")
        peak = known[0]
    assert peak is not None
    wanted = by_hand * INTERVAL / (clock.seconds * peak)
    record_property("MFU of plain matrix products", logged[1]["mfu"])
    assert logged[1]["mfu"] == pytest.approx(wanted, rel=0.1)
    assert 0 < logged[1]["mfu"] <= 1


@pytest.mark.gpu
def test_a_run_needs_no_more_memory_than_a_bare_loop(record_property: Any) -> None:
    """The peak over some steps is at most 1 % above that of the same loop in plain torch."""
    width, num_layers, num_steps = 2048, 12, 5
    x = torch.randn(64, width)

    def make_model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))

    def bare() -> int:
        model = make_model().cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        for step in range(num_steps):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
            model(x.cuda()).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated()

    class Reset(BaseHook):
        def on_before_step(self, trainer: BaseTrainer) -> None:
            if trainer.step == 3:
                torch.cuda.reset_peak_memory_stats()

    def ours() -> int:
        SmallTrainer(
            num_steps,
            grad_clip=1.0,
            data_loader=lambda self: [(x,)],
            model_=lambda self: make_model(),
            optimizer_=lambda self: torch.optim.AdamW(self.model.parameters()),
            hooks_=lambda self: [Reset()],
        ).train()
        return torch.cuda.max_memory_allocated()

    peaks: list[int] = []
    for run in (bare, ours, bare, ours):
        gc.collect()
        torch.cuda.empty_cache()
        start = torch.cuda.memory_allocated()
        peaks.append(run() - start)
    # The first two make cuBLAS's workspaces, which stay.
    record_property("peak memory to the bare loop", peaks[3] / peaks[2])
    assert peaks[3] <= 1.01 * peaks[2]
