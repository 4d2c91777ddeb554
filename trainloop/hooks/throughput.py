"""Measures the speed of a run (samples, tokens and operations per second) and what slows it down."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import check_int, check_interval, describe
from ..hook import BaseHook
from ..ranks import collectives

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense operations per second of one device, in the format of its matrix units for training (bf16; fp16 on V100 and
T4). The keys are words of the device's name; the first match counts. From NVIDIA's data sheets."""


class ThroughputHook(BaseHook):
    """Logs the speed of the run in every interval: `{"throughput": {…}}` to `trainer.log`, and a line on rank 0.

    | key | what |
    | --- | --- |
    | `samples_per_second` | samples that went into updates, over all ranks |
    | `weight_per_second` | the same for `batch_weight` (for example tokens), if it is overridden |
    | `mfu` | `flops_per_step` as a share of the peak of all devices |
    | `data_share` | share of the step time spent waiting for batches, on the rank where it is largest |
    | `slowest_rank` | the rank that takes longest until its last backward pass, see `StepInfo.own_time` |
    | `slowest_rank_ratio` | the time of that rank divided by the mean over the ranks; 1: all are equally fast |

    The time is that of the steps. It includes retries and waiting for data, but not the work of other hooks
    (evaluation, checkpoints). Discarded windows cost time and contribute no samples. Nothing is read from the device
    within an interval; at its end the ranks exchange a few host values. A resumed run begins a new interval.

    Args:
        batch_size: Samples in one micro-batch of one rank. None: the data loader's batch size; if it has none, samples
            are not shown.
        flops_per_step: Floating-point operations of one optimizer step, over all micro-batches and ranks. For a
            transformer about 6 x parameters x tokens. None: `mfu` is not shown.
        interval: Optimizer steps, or "epoch".
        peak_flops: Operations per second of one device. None: looked up for some NVIDIA GPUs, in bf16.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        flops_per_step: float | None = None,
        *,
        interval: int | str = 50,
        peak_flops: float | None = None,
    ) -> None:
        check_int("batch_size", batch_size, 1, optional=True)
        check_interval("interval", interval)
        for name, value in (("flops_per_step", flops_per_step), ("peak_flops", peak_flops)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"`{name}` must be a number or None, but is {describe(value)}.")
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, but is {value}.")
        self.batch_size = batch_size
        self.flops_per_step = flops_per_step
        self.interval = interval
        self.peak_flops = peak_flops
        self._start_interval()

    def _start_interval(self) -> None:
        self._num_steps = self._num_micro_batches = 0
        self._step_time = self._data_time = self._own_time = 0.0
        self._weights: list[Any] = []

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self._start_interval()
        self._batch_size = self.batch_size or getattr(trainer.data_loader, "batch_size", None)
        self._peak = self.peak_flops or _known_peak(trainer.device)
        if self.flops_per_step is not None and self._peak is None:
            trainer.logger.warning(
                "ThroughputHook can't show `mfu`, because the peak speed of this device is not known. Pass"
                " `peak_flops`, the floating-point operations per second of one device."
            )

    def on_after_step(self, trainer: BaseTrainer) -> None:
        info = trainer.step_info
        self._num_steps += 1
        self._num_micro_batches += len(info.losses)
        self._step_time += info.step_time
        self._data_time += info.data_time
        self._own_time += info.own_time
        if info.total_weight is not None:
            self._weights.append(info.total_weight)
        if trainer.is_due(self.interval):
            measured = self._measure()
            self._start_interval()
            trainer.logger.info(_line(trainer.step, measured))
            trainer.log({"throughput": measured})

    def _measure(self) -> dict[str, float]:
        """The interval's numbers, the same on every rank. Call on every rank."""
        own_time = self._own_time
        own = _Interval(
            self._num_micro_batches,
            self._step_time,
            self._data_time / self._step_time,
            own_time,
            own_time,
            collectives.rank(),
        )
        all_ranks = collectives.merge_over_ranks(own, _Interval.merged)
        num_ranks, seconds = collectives.world_size(), all_ranks.step_time
        measured = {}
        if self._batch_size is not None:
            measured["samples_per_second"] = all_ranks.num_micro_batches * self._batch_size / seconds
        if self._weights:
            measured["weight_per_second"] = _sum(self._weights) / seconds
        if self.flops_per_step is not None and self._peak is not None:
            measured["mfu"] = self.flops_per_step * self._num_steps / (seconds * self._peak * num_ranks)
        measured["data_share"] = all_ranks.data_share
        if num_ranks > 1:
            measured["slowest_rank"] = all_ranks.slowest_rank
            measured["slowest_rank_ratio"] = all_ranks.most_own_time * num_ranks / all_ranks.sum_own_time
        return measured


class _Interval(NamedTuple):
    """The measurements of a group of ranks in one interval."""

    num_micro_batches: int
    step_time: float
    data_share: float
    sum_own_time: float
    most_own_time: float
    slowest_rank: int

    def merged(self, other: _Interval) -> _Interval:
        """Merge them with those of another group, whose ranks are higher."""
        slower = other if other.most_own_time > self.most_own_time else self
        return _Interval(
            self.num_micro_batches + other.num_micro_batches,
            max(self.step_time, other.step_time),
            max(self.data_share, other.data_share),
            self.sum_own_time + other.sum_own_time,
            slower.most_own_time,
            slower.slowest_rank,
        )


def _sum(weights: list[Any]) -> float:
    """Sum of numbers, or of 0-dim tensors on one device, which costs a device-to-host sync."""
    if isinstance(weights[0], torch.Tensor):
        return float(torch.stack(weights).sum())
    return float(sum(weights))


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def _line(step: int, measured: dict[str, float]) -> str:
    parts = [f"step {step}"]
    for key, unit in (("samples_per_second", "samples/s"), ("weight_per_second", "of `batch_weight`/s")):
        if key in measured:
            parts.append(f"{measured[key]:.4g} {unit}")
    if "mfu" in measured:
        parts.append(f"MFU {measured['mfu']:.1%}")
    parts.append(f"waiting for data {measured['data_share']:.1%}")
    if "slowest_rank" in measured:
        parts.append(f"slowest rank {measured['slowest_rank']}, {measured['slowest_rank_ratio']:.2f} x the mean")
    return " | ".join(parts)
