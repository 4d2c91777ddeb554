"""How fast a run says it is: what counted, over the time that it took."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, ThroughputHook
from trainloop.hooks import throughput

from .small import SmallTrainer


class Clock(BaseHook):
    """Every step takes a second, a quarter of it waiting for data; hears what is logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_after_step(self, trainer: BaseTrainer) -> None:
        trainer.step_info.step_time, trainer.step_info.data_time = 1.0, 0.25

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self.logged.append(records["throughput"])


def logged(max_steps: int, hook: ThroughputHook, **kwargs: Any) -> list[dict[str, float]]:
    clock = Clock()
    SmallTrainer(max_steps, hooks_=lambda self: [clock, hook], **kwargs).train()
    return clock.logged


def test_samples_and_operations_are_counted_over_the_steps_time(caplog: pytest.LogCaptureFixture) -> None:
    """4 micro-batches of 2 samples a second; 3e9 of 12e9 operations; each interval for itself, also as a line."""
    hook = ThroughputHook(flops_per_step=3e9, interval=2, peak_flops=12e9)
    with caplog.at_level(logging.INFO, "trainloop"):
        found = logged(5, hook, gradient_accumulation_steps=4)
    assert found == [{"samples_per_second": 8.0, "mfu": 0.25, "data_share": 0.25}] * 2
    assert caplog.messages[1:] == [  # the first says what the run is
        f"[RANK 0] step {step} | 8 samples/s | MFU 25.0% | waiting for data 25.0%" for step in (2, 4)
    ]


def test_tokens_are_what_batch_weight_counts() -> None:
    """The weights of the applied windows: of micro-batch n it is n, so 1 + 2 and then 3 + 4 in two seconds; a weight
    of 0 counts as such.
    """

    class Weighted(SmallTrainer):
        num_drawn = 0

        def batch_weight(self, batch: Any) -> Any:
            self.num_drawn += 1
            return torch.tensor(self.num_drawn % 4)

    clock = Clock()
    Weighted(2, gradient_accumulation_steps=2, hooks_=lambda self: [clock, ThroughputHook(interval=2)]).train()
    assert [records["weight_per_second"] for records in clock.logged] == [(1 + 2 + 3 + 0) / 2]


def test_a_discarded_window_costs_time_and_counts_for_nothing() -> None:
    """Two of the windows are not finite: the samples are those of the two that were applied."""
    calls = iter(range(9))

    def forward(self: Any, batch: Any) -> Any:
        return self.model(batch[0]).mean() * (float("nan") if next(calls) in (0, 2) else 1.0), {}

    assert logged(2, ThroughputHook(interval=2), forward_=forward)[0]["samples_per_second"] == 2.0


def test_slow_data_shows_as_waiting() -> None:
    """By the real clock: a loader that sleeps takes most of the step."""

    class Slow(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.02)
            return super().__getitem__(index)

    shares = []

    class Log(BaseHook):
        def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
            shares.append(records["throughput"]["data_share"])

    SmallTrainer(
        4,
        data_loader=lambda self: DataLoader(Slow(torch.ones(8, 3)), batch_size=2),
        hooks_=lambda self: [ThroughputHook(interval=4), Log()],
    ).train()
    assert 0.5 < shares[0] < 1


def test_data_without_a_batch_size_shows_no_samples() -> None:
    """Unless it is given."""
    batches = [(torch.ones(2, 3),)] * 2
    assert "samples_per_second" not in logged(1, ThroughputHook(interval=1), data_loader=lambda self: batches)[0]
    given = logged(1, ThroughputHook(2, interval=1), data_loader=lambda self: batches)
    assert given[0]["samples_per_second"] == 2.0


def test_an_unknown_peak_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Operations were given and this device's peak is not known: a warning names the argument; `mfu` is left out."""
    with caplog.at_level(logging.WARNING, "trainloop"):
        assert "mfu" not in logged(1, ThroughputHook(flops_per_step=1e9, interval=1))[0]
    assert ["`peak_flops`" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("Tesla T4", 65e12),
    ],
)
def test_the_peak_is_that_of_the_device_and_of_no_other(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the words of its name: an L40 is no L4."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput._known_peak(torch.device("cuda")) == peak


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, but is 0."),
        ({"interval": 0}, ValueError, "`interval` must be at least 1, but is 0."),
        ({"flops_per_step": -1.0}, ValueError, "`flops_per_step` must be positive, but is -1.0."),
        ({"peak_flops": "989e12"}, TypeError, "`peak_flops` must be a number or None, but is '989e12' (str)."),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """At construction."""
    with pytest.raises(error) as caught:
        ThroughputHook(**arguments)
    assert str(caught.value) == message
