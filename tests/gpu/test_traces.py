"""A step on this device is a step of a plain torch loop: every loss, norm, learning rate and weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer, NonFiniteGradientError

from ..small import SmallTrainer
from .devices import on_each_device, why_not_compiling

STEPS = 8
CLIP = 0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**24
"""Too high at first: some windows overflow until the scale fits."""
Batches = list[tuple[torch.Tensor, torch.Tensor]]
Row = dict[str, float]
Record = Callable[[str, object], None]


def make_batches() -> Batches:
    """Five batches of 16 samples, which the run goes through again and again."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(5, 16, 24, generator=generator)
    return [(part, part.pow(2).sum(1, keepdim=True).sin()) for part in x]


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))


def make_optimizer(model: nn.Module, is_fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=is_fused or None)


def make_lr_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)


def make_scaler(device: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=3)


def loss_of(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output.float(), y)


def plain_loop(
    device: str, precision: str, num_micro: int, is_compiled: bool, is_fused: bool
) -> tuple[list[Row], nn.Module, int]:
    """The training in plain torch. Returns a row a step, the model, and how many windows overflowed."""
    model = make_model().to(device)
    run: Any = torch.compile(model) if is_compiled else model
    optimizer = make_optimizer(model, is_fused)
    scheduler = make_lr_scheduler(optimizer)
    scaler = make_scaler(device) if precision == "fp16" else None
    dtype = DTYPES.get(precision)
    batches = itertools.cycle(make_batches())
    rows: list[Row] = []
    num_overflows = 0
    while len(rows) < STEPS:
        losses = []
        for _ in range(num_micro):
            x, y = (part.to(device) for part in next(batches))
            with torch.autocast(device, dtype, enabled=dtype is not None):
                output = run(x)
            loss = loss_of(output, y)
            losses.append(loss.detach())
            share = loss / num_micro if num_micro > 1 else loss
            (scaler.scale(share) if scaler is not None else share).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        row = {"loss": torch.stack(losses).mean().item(), "norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
            row["scale"] = scaler.get_scale()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(norm):
            num_overflows += 1
            continue
        scheduler.step()
        rows.append(row)
    return rows, model, num_overflows


class Trace(BaseHook):
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.num_overflows = 0

    def on_before_step(self, trainer: BaseTrainer) -> None:
        self.lr = trainer.optimizer.param_groups[0]["lr"]

    def on_after_step(self, trainer: BaseTrainer) -> None:
        info = trainer.step_info
        self.rows.append({"loss": info.loss.item(), "norm": info.grad_norm, "lr": self.lr})
        if trainer.grad_scaler is not None:
            self.rows[-1]["scale"] = trainer.grad_scaler.get_scale()
        self.num_overflows += info.overflow_count


def trained(
    device: str, precision: str, num_micro: int, is_compiled: bool, is_fused: bool
) -> tuple[Trace, SmallTrainer]:
    trace = Trace()
    trainer = SmallTrainer(
        STEPS,
        grad_clip=CLIP,
        mixed_precision=precision,
        gradient_accumulation_steps=num_micro,
        device=device,
        data_loader=lambda self: make_batches(),
        model_=lambda self: torch.compile(make_model()) if is_compiled else make_model(),
        optimizer_=lambda self: make_optimizer(self.model, is_fused),
        lr_scheduler_=lambda self: make_lr_scheduler(self.optimizer),
        grad_scaler_=lambda self: make_scaler(device) if precision == "fp16" else None,
        hooks_=lambda self: [trace],
        forward_=lambda self, batch: (loss_of(self.model(batch[0]), batch[1]), {}),
    )
    trainer.train()
    return trace, trainer


def compare(
    device: str,
    precision: str,
    num_micro: int,
    record: Record,
    tolerance: float,
    *,
    is_compiled: bool = False,
    is_fused: bool = False,
) -> int:
    """Assert that both train the same, and record whether to the last bit. Returns how many windows overflowed."""
    wanted, model, num_overflows = plain_loop(device, precision, num_micro, is_compiled, is_fused)
    trace, trainer = trained(device, precision, num_micro, is_compiled, is_fused)
    assert trainer._update.reads_last == (is_fused and device == "cuda")
    pairs = list(zip(trainer.unwrapped_model.parameters(), model.parameters(), strict=True))
    record("same bits as the plain loop", trace.rows == wanted and all(torch.equal(a, b) for a, b in pairs))
    assert len(trace.rows) == STEPS
    for step, (row, other) in enumerate(zip(trace.rows, wanted, strict=True), 1):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance), f"step {step}"
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)
    assert trace.num_overflows == num_overflows
    return num_overflows


@on_each_device
@pytest.mark.parametrize("is_fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("num_micro", [1, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_is_that_of_a_plain_loop(
    device: str, precision: str, num_micro: int, is_fused: bool, record_property: Record
) -> None:
    """In fp32 and bf16, with clipping, accumulated and not. With a fused optimizer on a GPU the update is queued before
    the host reads the norm.
    """
    compare(device, precision, num_micro, record_property, tolerance=1e-6, is_fused=is_fused)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_model_trains_as_in_a_plain_loop(device: str, precision: str, record_property: Record) -> None:
    """`build_model` returns what `torch.compile` made."""
    if reason := why_not_compiling(device):
        pytest.skip(f"torch.compile does not work here: {reason}")
    compare(device, precision, 1, record_property, tolerance=1e-4, is_compiled=True)


@pytest.mark.gpu
@pytest.mark.parametrize("is_fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("num_micro", [1, 3])
def test_fp16_with_a_scaler_is_a_plain_loop_with_one(num_micro: int, is_fused: bool, record_property: Record) -> None:
    """Windows that overflow at first are dropped and lower the scale, windows that fit raise it again; the learning
    rate moves with the updates only.
    """
    num_overflows = compare("cuda", "fp16", num_micro, record_property, tolerance=1e-5, is_fused=is_fused)
    record_property("windows that overflowed", num_overflows)
    assert num_overflows > 0


@pytest.mark.gpu
def test_a_loss_scale_that_collapses_ends_the_run() -> None:
    """No scale makes the gradient finite, so fp16 stops and says so."""
    trainer = SmallTrainer(
        3,
        mixed_precision="fp16",
        forward_=lambda self, batch: (self.model(batch[0]).float().mean() * float("nan"), {}),
    )
    with pytest.raises(NonFiniteGradientError, match="the loss scale collapsed to"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.gpu
def test_an_overflow_in_fp16_lowers_the_scale_and_the_step_is_taken() -> None:
    """A scale that is far too high at first: no retry is counted, the learning rate moves once a step, and the weights
    stay finite.
    """
    overflows: list[int] = []

    class Overflows(BaseHook):
        def on_after_step(self, trainer: BaseTrainer) -> None:
            assert trainer.step_info.non_finite_grad_retry_count == 0
            overflows.append(trainer.step_info.overflow_count)

    trainer = SmallTrainer(
        3,
        mixed_precision="fp16",
        forward_=lambda self, batch: (self.model(batch[0]).float().pow(2).mean(), {}),
        grad_scaler_=lambda self: torch.amp.GradScaler("cuda", init_scale=2.0**60),
        lr_scheduler_=lambda self: torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5),
        hooks_=lambda self: [Overflows()],
    )
    trainer.train()
    assert overflows[0] > 0
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
