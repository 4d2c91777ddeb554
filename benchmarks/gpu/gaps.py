"""Where the device idles and the host waits within a step, from the profiler's trace: `python -m benchmarks.gpu.gaps`.

Each system trains some steps to warm up and some more under the profiler.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.profiler import ProfilerActivity, profile

from ..tasks import Task
from ..turns import TurnTakingData
from ..worker import SYSTEMS

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_NORM = ("LpNorm", "lpnorm")
"""Parts of the names of the kernels of `torch._foreach_norm`."""
_UPDATE = "multi_tensor_apply_kernel"
"""Part of the names of the kernels that clip and update; those of the norm have it as well."""


@dataclass
class Gap:
    """One step, from the end of the last kernel that takes the tensors' norms to the first that clips or updates."""

    span: float
    """Microseconds between the two."""
    idle: float
    """Microseconds of the span in which nothing ran on the device."""


def gaps(events: Iterable[Mapping[str, Any]]) -> list[Gap]:
    """The gap of each step.

    Args:
        events: Of a chrome trace, as the profiler writes it, of any number of steps.
    """
    on_device = sorted((e for e in events if e.get("cat") in _ON_DEVICE), key=lambda event: float(event["ts"]))
    found: list[Gap] = []
    norm_end, busy_until, idle = None, 0.0, 0.0
    for event in on_device:
        name, start = str(event["name"]), float(event["ts"])
        end = start + float(event["dur"])
        if any(part in name for part in _NORM):
            norm_end, busy_until, idle = end, end, 0.0
            continue
        if norm_end is None:
            continue
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
        if _UPDATE in name:
            found.append(Gap(start - norm_end, idle))
            norm_end = None
    return found


def host_waits(events: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds that the host spent in calls which wait for the device, in all."""
    runtime = (e for e in events if e.get("cat") in {"cuda_runtime", "cuda_driver"})
    return sum(float(e["dur"]) for e in runtime if "Synchronize" in str(e["name"]))


def device_busy(events: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds in which the device did anything, in all."""
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e.get("cat") in _ON_DEVICE)
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


class ProfiledData(TurnTakingData):
    """Lets the second of three turns run under the profiler, and waits for nobody."""

    def __init__(self, task: Task, folder: Path) -> None:
        super().__init__(task, None, lambda: 0, folder, deals_samples=False)  # type: ignore[arg-type]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (task.device == "cuda")
        self._profiler = profile(activities=activities)
        self._turn = 0

    def _wait_for_turn(self) -> None:
        if self._task.device == "cuda":
            torch.cuda.synchronize()
        if self._turn == 1:
            self._profiler.start()
        if self._turn == 2:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.folder / "trace.json"))
        self._turn += 1

    def events(self) -> list[dict[str, Any]]:
        trace: dict[str, Any] = json.loads((self.folder / "trace.json").read_text())
        return [event for event in trace["traceEvents"] if "dur" in event]


def measure(task: Task, system: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the trace of one system's steps says."""
    with tempfile.TemporaryDirectory() as folder:
        data = ProfiledData(task, Path(folder))
        importlib.import_module(f"benchmarks.systems.{SYSTEMS[system]}").train(task, data, **options)
        events = data.events()
    found = gaps(events)
    return {
        "idle_us": [gap.idle for gap in found],
        "span_us": [gap.span for gap in found],
        "host_waits_us": host_waits(events) / task.num_steps,
        "device_busy_us": device_busy(events) / task.num_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", required=True, help="JSON: by title the task, the system's name, its options")
    parser.add_argument("--json", type=Path, required=True, help="write the results there, again after each request")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    results = {}
    for title, request in json.loads(args.requests).items():
        AcceleratorState._reset_state(True)  # a process has one mixed precision, and these tasks have several
        GradientState._reset_state()
        results[title] = measure(Task(**request["task"]), request["system"], request["options"])
        args.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
