"""The goals, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .account import LEDGER, STEP
from .harness import Measured, quartiles, ratios
from .suite import Results


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: float
    """The median."""
    spread: tuple[float, float] | None = None
    """The quartiles."""
    goal: float | None = None
    """At most this much; None: shown beside."""
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.goal is None or self.value != self.value:
            return ""
        return "met" if self.value <= self.goal else "**missed**"


def rows(results: Results) -> list[Row]:
    """Every line that these results have something to say about, goals first where they stand."""
    return [*_steps(results), *_reads(results), *_updates(results), *_checkpoints(results), *_footprint(results)]


def _ratio(what: str, values: Sequence[float], reference: Sequence[float], goal: float | None, note: str = "") -> Row:
    low, middle, high = quartiles(ratios(values, reference))
    return Row(what, middle, (low, high), goal, note)


def _steps(results: Results) -> list[Row]:
    found = []
    for model, num_micro, system, base, goal in (
        ("tiny MLP", 1, "trainloop", "bare torch", 1.00),
        ("tiny MLP", 4, "trainloop", "bare torch", 1.00),
        ("tiny MLP", 1, "trainloop, four hooks", "bare torch", 1.10),
        ("tiny MLP", 4, "trainloop, four hooks", "bare torch", 1.10),
        ("tiny MLP", 1, "trainloop", "bare Accelerate", 0.70),
        ("tiny MLP", 1, "trainloop, four hooks", "bare Accelerate", 0.70),
        ("10M transformer", 1, "trainloop", "bare torch", 1.01),
        ("10M transformer", 1, "trainloop, four hooks", "bare torch", None),
    ):
        measured = results.step(model, num_micro)
        if measured and is_comparable(measured[system]) and is_comparable(measured[base]):
            what = f"step, {model}, accumulation {num_micro}: {system} to {base}"
            found.append(_ratio(what, measured[system].cpu, measured[base].cpu, goal))
    return found


def is_comparable(measured: Measured) -> bool:
    """Whether its time counts: it ran, and has trained the same."""
    return not measured.error and measured.is_equal


def _reads(results: Results) -> list[Row]:
    return [
        Row(f"host reads a step, accumulation {num_micro}: {name}", measured.host_reads, None, 1.0)
        for name in ("trainloop", "trainloop, four hooks")
        for num_micro, measured in results.host_reads.get(name, {}).items()
    ]


def _updates(results: Results) -> list[Row]:
    found = []
    for model, seconds in results.averages.items():
        bare = seconds["_foreach_lerp_ on cached lists"]
        for name, goal in (("EmaHook", 1.10), ("AveragedModel, foreach", None)):
            what = f"average of the weights, {model}: {name} to `_foreach_lerp_`"
            found.append(_ratio(what, seconds[name], bare, goal))
    if results.ledger:
        found.append(_ratio("ledger: share of a tiny step", results.ledger[LEDGER], results.ledger[STEP], 0.01))
    for name, values in list(results.finite_checks.items())[1:]:
        reference = results.finite_checks["torch's clip alone"]
        what = f"finite check and clip, 400 tensors: {name} to torch's clip alone"
        found.append(_ratio(what, values, reference, None))
    return found


def _checkpoints(results: Results) -> list[Row]:
    if not results.checkpoint:
        return []
    saves, loads = results.checkpoint["saves"], results.checkpoint["loads"]
    megabytes = f"{results.checkpoint['bytes'] / 1e6:.0f} MB"
    found = []
    for name, timings, base, goal in (
        ("trainloop async", saves, "memcpy into reused buffers", 1.5),
        ("trainloop", saves, "safetensors + fsync", 1.2),
        ("trainloop, verified", loads, "safetensors load", 3.5),
    ):
        own, other = ([blocked for blocked, _ in timings[key][1:]] for key in (name, base))
        kind = "load" if timings is loads else "save, blocked"
        first = f"first: {timings[name][0][0] * 1e3:.0f} ms; then {quartiles(own)[1] * 1e3:.0f} ms"
        found.append(_ratio(f"{kind}, {megabytes}: {name} to {base}, wall", own, other, goal, first))
    return found


def _footprint(results: Results) -> list[Row]:
    found = []
    if results.imports:
        torch_seconds = [cpu for cpu, _ in results.imports["torch"]]
        for name, values in results.imports.items():
            if name != "torch":
                goal = 1.15 if name == "trainloop" else None
                note = f"{values[0][1]} modules, torch {results.imports['torch'][0][1]}"
                seconds = [cpu for cpu, _ in values]
                found.append(_ratio(f"import, CPU: {name} to torch", seconds, torch_seconds, goal, note))
    measured = results.step("tiny MLP")
    if measured:
        bare = measured["bare torch"]
        for name, own in measured.items():
            if name != "bare torch" and is_comparable(own):
                above = (own.resident - bare.resident) / 2**20
                found.append(
                    Row(
                        f"start to first step, CPU: {name} to bare torch",
                        own.first_step_cpu / bare.first_step_cpu,
                        note=f"{own.first_step_cpu:.2f} s; {above:+.0f} MiB resident",
                    )
                )
    return found
