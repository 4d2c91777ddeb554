"""The parts of the GPU benchmark, one after the other, each within a time of its own.

What was measured is written after each part, so that a run that is ended early has that. A part that fails says so in
the results, and the next one begins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..environment import environment
from ..harness import BARE_ACCELERATE, BARE_TORCH, FOUR_HOOKS, REPOSITORY, TRAINLOOP, Measured, System, run
from ..tasks import Task

LIGHTNING = System("Lightning")
EVERYONE = [BARE_TORCH, BARE_ACCELERATE, LIGHTNING, TRAINLOOP, FOUR_HOOKS]
DETERMINISTIC = System("trainloop", {"is_deterministic": True}, "trainloop, deterministic")
TINY = "tiny MLP"
COMPILED_GPT, LAUNCHED = "GPT, compiled", "tiny MLP, DDP with one process"
GRACE = 3.0
"""Seconds that a part's process gets beyond its limit, to end by itself."""


@dataclass
class Plan:
    """What is measured how often: on a GPU, or, far smaller, to try out the benchmark itself on a CPU."""

    device: str
    gpt: str
    small: str
    """A model whose step is nothing but launches."""
    steps: dict[str, tuple[int, int]]
    """Steps a turn and turns, by part."""
    num_rounds: int
    """Of the saves; the averages take twice as many."""

    def task(self, part: str, model: str, **more: Any) -> Task:
        num_steps, num_turns = self.steps[part]
        return Task(
            model, num_steps=num_steps, num_turns=num_turns, optimizer="fused adamw", device=self.device, **more
        )


ON_GPU = Plan(
    device="cuda",
    gpt="GPT 124M",
    small="10M transformer",
    steps={
        "launch-bound": (100, 13),
        "GPT": (20, 10),
        COMPILED_GPT: (20, 10),
        LAUNCHED: (200, 11),
        "deterministic": (20, 7),
        "gaps": (5, 3),
    },
    num_rounds=4,
)
ON_CPU = Plan(
    device="cpu",
    gpt="GPT tiny",
    small="tiny MLP",
    steps=dict.fromkeys(ON_GPU.steps, (2, 3)),
    num_rounds=1,
)


@dataclass
class Results:
    """All that was measured; what a run left out is empty."""

    machine: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, tuple[Task, dict[str, Measured]]] = field(default_factory=dict)
    """By part."""
    gaps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model and system, see `gaps.py`."""
    saves: dict[str, Any] = field(default_factory=dict)
    """See `saves.py`."""
    averages: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By model and contender, see `averages.py`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part took."""
    problems: dict[str, str] = field(default_factory=dict)
    """By part: why it has no results, or not all of them."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(plan: Plan, seconds: float, save: Callable[[Results], None], only: Sequence[str] | None = None) -> Results:
    """Run all parts.

    Args:
        plan: What is measured.
        seconds: How long it may take in all. A part for which too little is left is skipped, and said to be.
        save: Called after each part.
        only: Names of the parts to run, which then share the time evenly. None: all of them.
    """
    end = time.monotonic() + seconds
    results = Results(machine=machine())
    # Most telling first. The second number is how much of the time a part may take at most.
    parts: list[tuple[str, float, Callable[[float], None]]] = [
        ("launch-bound", 0.25, partial(_steps, results, plan, "launch-bound", plan.small, EVERYONE)),
        ("GPT", 0.3, partial(_steps, results, plan, "GPT", plan.gpt, EVERYONE, precision="bf16")),
        ("gaps", 0.3, partial(_gaps, results, plan)),
        ("saves", 0.25, partial(_saves, results, plan)),
        (
            COMPILED_GPT,
            0.45,
            partial(_steps, results, plan, COMPILED_GPT, plan.gpt, EVERYONE, precision="bf16", is_compiled=True),
        ),
        ("averages", 0.15, partial(_averages, results, plan)),
        (
            "deterministic",
            0.2,
            partial(_steps, results, plan, "deterministic", plan.gpt, [TRAINLOOP, DETERMINISTIC], precision="bf16"),
        ),
        (
            LAUNCHED,
            0.2,
            partial(_steps, results, plan, LAUNCHED, TINY, [BARE_TORCH, BARE_ACCELERATE, TRAINLOOP], is_launched=True),
        ),
    ]
    if only is not None:
        parts = [(name, 1 / len(only), part) for name, _, part in parts if name in only]
    for name, share, part in parts:
        start = time.monotonic()
        left = end - start
        limit = min(share * seconds, left - GRACE)
        if limit < 0.05 * seconds:
            results.problems[name] = f"skipped: {max(left, 0):.0f} s were left of {seconds:.0f} s"
        else:
            try:
                part(limit)
            except Exception as ex:
                traceback.print_exc()
                results.problems[name] = f"{type(ex).__name__}: {ex}"[:400]
            results.seconds[name] = time.monotonic() - start
        told = results.problems.get(name, f"{results.seconds.get(name, 0):.0f} s")
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {told}", flush=True)
        save(results)
    return results


def machine() -> dict[str, Any]:
    """What it runs on."""
    about: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count(), "device": "none"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    return about


def _steps(
    results: Results, plan: Plan, part: str, model: str, systems: Sequence[System], limit: float, **more: Any
) -> None:
    task = plan.task(part, model, **more)
    until = time.monotonic() + limit
    shared = {"TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(_cache_dir()))}
    os.environ.update(shared)  # the systems start with it: what one has compiled, the next one finds
    measured = run(task, systems, timeout=limit, together=True, until=until)
    results.steps[part] = (task, measured)
    failed = [f"{name}: {own.error}" for name, own in measured.items() if own.error]
    if time.monotonic() > until:
        failed.append(f"its {limit:.0f} s were over after {max(len(own.wall) for own in measured.values())} turns")
    if failed:
        results.problems[part] = "; ".join(failed)[:400]


def _cache_dir() -> Path:
    path = Path(tempfile.gettempdir(), "trainloop-benchmark-inductor")
    path.mkdir(exist_ok=True)
    return path


def warm_compile_cache(plan: Plan) -> None:
    """Fill the cache of compiled kernels that `_steps` uses: two steps of each system. Nothing is measured."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache_dir()))
    task = plan.task(COMPILED_GPT, plan.gpt, precision="bf16", is_compiled=True)
    for system in EVERYONE:
        run(replace(task, num_steps=1, num_turns=1), [system], timeout=150)


def _gaps(results: Results, plan: Plan, limit: float) -> None:
    requests = {
        f"{model}: {system.title}": {
            "task": asdict(plan.task("gaps", model, precision=precision)),
            "system": system.name,
            "options": system.options,
        }
        for model, precision in ((plan.gpt, "bf16"), (plan.small, "no"))
        for system in (TRAINLOOP, BARE_TORCH, BARE_ACCELERATE)
    }
    _in_a_process("gaps", limit, "--requests", json.dumps(requests), into=results.gaps)


def _saves(results: Results, plan: Plan, limit: float) -> None:
    arguments = ["--device", plan.device, "--model", plan.gpt, "--rounds", str(plan.num_rounds)]
    arguments += ["--seconds", str(0.8 * limit)]
    _in_a_process("saves", limit, *arguments, into=results.saves)


def _averages(results: Results, plan: Plan, limit: float) -> None:
    models = ["--models", "400 small tensors", plan.gpt]
    arguments = ["--device", plan.device, "--rounds", str(2 * plan.num_rounds), *models]
    _in_a_process("averages", limit, *arguments, into=results.averages)


def _in_a_process(module: str, limit: float, *arguments: str, into: dict[str, Any]) -> None:
    """Add what a module of this folder writes, also where it is ended by the limit, which then raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.gpu.{module}", "--json", str(path), *arguments]
        try:
            done = subprocess.run(command, env=environment(), cwd=REPOSITORY, timeout=limit, capture_output=True)
            output, problem = done.stdout + done.stderr, f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as ex:
            output, problem = (ex.stdout or b"") + (ex.stderr or b""), f"it took longer than {limit:.0f} s"
        if path.exists():
            into.update(json.loads(path.read_text()))
    if problem:
        text = output.decode(errors="replace").strip()
        print(text[-4000:], file=sys.stderr, flush=True)
        raise RuntimeError(f"{module}: {problem}: {text.splitlines()[-1] if text else 'it said nothing'}")
