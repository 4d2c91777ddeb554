"""Which tasks are trained with which systems, quick and in full, and what else is measured beside."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import account, footprint, growth, real_ranks, updates
from .environment import environment
from .harness import FOUR_HOOKS, MAIN, PEERS, REPOSITORY, TRAINLOOP, Measured, System, run
from .tasks import Task

STEPS_AND_TURNS = {
    "tiny MLP": (100, 25),
    "tiny MLP, BatchNorm": (100, 25),
    "400 small tensors": (8, 15),
    "10M transformer": (2, 11),
}
"""Optimizer steps a turn, and turns, at accumulation 1; at 4 a quarter of the steps, but at least one."""


MODELS = ("tiny MLP", "400 small tensors", "10M transformer")


@dataclass
class Results:
    """All that was measured; what a run left out is empty."""

    steps: list[tuple[Task, dict[str, Measured]]] = field(default_factory=list)
    host_reads: dict[str, dict[int, Measured]] = field(default_factory=dict)
    """By system and accumulation."""
    averages: dict[str, updates.Seconds] = field(default_factory=dict)
    """By model."""
    finite_checks: updates.Seconds = field(default_factory=dict)
    ledger: updates.Seconds = field(default_factory=dict)
    imports: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    """Bytes, saves and loads, as `benchmarks.checkpoint` writes them."""
    growth: list[growth.Growth] = field(default_factory=list)

    def step(self, model: str, num_micro: int = 1, precision: str = "no", world_size: int = 1) -> dict[str, Measured]:
        """What the systems needed for this task; empty if it was left out."""
        wanted = (model, num_micro, precision, world_size)
        for task, measured in self.steps:
            if (task.model, task.num_micro, task.precision, task.world_size) == wanted and not task.is_sharded:
                return measured
        return {}


def quick(results: Results, scale: float = 1.0) -> None:
    """A few minutes: one process, fp32, without the peers."""
    for model in MODELS:
        for num_micro in (1, 4):
            _train(results, _task(model, scale, num_micro=num_micro), MAIN)
    _count_host_reads(results, MAIN)
    _measure_updates(results, scale)
    _say("imports")
    results.imports = footprint.imports(max(2, round(5 * scale)))


def full(results: Results, scale: float = 1.0) -> None:
    """Everything, what the goals name first: a run that is ended early has that."""
    everyone = [*MAIN, *PEERS]
    for model in MODELS:
        for num_micro in (1, 4):
            _train(results, _task(model, scale, num_micro=num_micro), everyone)
    _count_host_reads(results, everyone)
    _measure_updates(results, scale)
    _say("imports")
    results.imports = footprint.imports(max(2, round(9 * scale)))
    _say("checkpoint")
    results.checkpoint = _checkpoint(scale)
    _say("growth")
    results.growth = growth.measure(scale)
    _train(results, _task("tiny MLP, BatchNorm", scale), MAIN)
    for more in ({"world_size": 2}, {"precision": "bf16"}):
        for model in MODELS:
            for num_micro in (1, 4):
                _train(results, _task(model, scale, num_micro=num_micro, **more), everyone)
    sharded(results, scale)


def sharded(results: Results, scale: float = 1.0) -> None:
    """Steps of two processes under FSDP2. The peers are left out: they shard on a GPU only."""
    for model in MODELS:
        _train(results, _task(model, scale, world_size=2, is_sharded=True), MAIN)


def check() -> list[str]:
    """The form for CI, about a minute: equality, host reads and counts of 8 ranks, never a time. Returns what is
    wrong.
    """
    wrong = []
    for task in (
        Task("tiny MLP, BatchNorm", num_steps=20, num_turns=3, optimizer="sgd", counts_host_reads=True),
        Task("tiny MLP", num_micro=4, num_steps=20, num_turns=3, optimizer="sgd", counts_host_reads=True),
        Task("400 small tensors", num_micro=2, num_steps=4, num_turns=2, precision="bf16"),
        Task("tiny MLP", num_micro=2, num_steps=10, num_turns=2, world_size=2),
        Task("tiny MLP", num_micro=2, num_steps=10, num_turns=2, world_size=2, is_sharded=True),
    ):
        _say(_describe(task))
        for name, measured in run(task, MAIN).items():
            if measured.error:
                wrong.append(f"{_describe(task)}: {name} failed: {measured.error}")
            elif not measured.is_equal:
                wrong.append(f"{_describe(task)}: {name}'s parameters differ by {measured.difference:.3g}")
            is_ours = name in (TRAINLOOP.title, FOUR_HOOKS.title)
            if is_ours and task.counts_host_reads and not measured.host_reads <= 1:
                wrong.append(f"{_describe(task)}: {name} reads {measured.host_reads:g} times a step")
    _say("counts of 8 ranks")
    with tempfile.TemporaryDirectory() as folder:
        wrong += real_ranks.broken_laws(8, real_ranks.run(8, Path(folder)))
    return wrong


def _task(model: str, scale: float, **more: Any) -> Task:
    num_steps, num_turns = STEPS_AND_TURNS[model]
    num_steps = max(1, num_steps // more.get("num_micro", 1))
    return Task(model, num_steps=num_steps, num_turns=max(3, round(num_turns * scale)), **more)


def _train(results: Results, task: Task, systems: Sequence[System]) -> None:
    _say(_describe(task))
    results.steps.append((task, run(task, systems)))


def _count_host_reads(results: Results, systems: Sequence[System]) -> None:
    for num_micro in (1, 4):
        task = Task("tiny MLP", num_micro, num_steps=20, num_turns=3, optimizer="sgd", counts_host_reads=True)
        _say(f"host reads, {_describe(task)}")
        for name, measured in run(task, systems).items():
            results.host_reads.setdefault(name, {})[num_micro] = measured


def _measure_updates(results: Results, scale: float) -> None:
    num_rounds = max(3, round(25 * scale))
    _say("average of the weights, finite check, ledger")
    results.averages = {
        model: updates.averages(model, num_rounds, num_calls)
        for model, num_calls in (("400 small tensors", 50), ("10M transformer", 10))
    }
    results.finite_checks = updates.finite_checks("400 small tensors", num_rounds, 20)
    results.ledger = account.ledger(max(3, num_rounds // 3))


def _checkpoint(scale: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.json")
        command = [sys.executable, "-m", "benchmarks.checkpoint", "--json", str(path)]
        command += ["--rounds", str(max(3, round(25 * scale)))]
        subprocess.run(command, check=True, env=environment(), cwd=REPOSITORY)
        measured: dict[str, Any] = json.loads(path.read_text())
        return measured


def _describe(task: Task) -> str:
    parts = [task.model, f"accumulation {task.num_micro}"]
    parts += ["bf16"] if task.precision == "bf16" else []
    parts += [task.strategy] if task.strategy else []
    return ", ".join(parts)


def _say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)
