"""The GPU benchmark's results as Markdown: the goals, and the tables that they rest on."""

from __future__ import annotations

from typing import Any

from ..goals import Row
from ..harness import BARE_ACCELERATE, BARE_TORCH, FOUR_HOOKS, TRAINLOOP, Measured, quartiles, ratios
from ..report import goals_table, table
from ..tasks import TEXTS, Task, batch_size, make_model
from .suite import COMPILED_GPT, DETERMINISTIC, LAUNCHED, Results

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second, by a word of the device's name."""


def markdown(results: Results) -> str:
    """Goals first."""
    about = results.machine
    memory = f", {about['memory_gb']:.0f} GB" if "memory_gb" in about else ""
    parts = [f"Measured on: {about['device']}{memory}, {about['cores']} cores, torch {about['torch']}."]
    parts += ["### Goals", goals_table(rows(results))]
    if results.steps:
        parts += ["### Every step", _STEP_CAPTION, steps_table(results)]
    if results.gaps:
        parts += ["### Within a step, from the profiler's trace", gaps_table(results.gaps)]
    if results.saves:
        parts += ["### Saves", saves_table(results.saves)]
    if results.averages:
        parts += ["### Average of the weights", averages_table(results.averages)]
    if results.problems:
        parts += ["### What is missing", "\n".join(f"- {part}: {why}" for part, why in results.problems.items())]
    parts.append("Seconds a part: " + ", ".join(f"{part} {s:.0f}" for part, s in results.seconds.items()) + ".")
    return "\n\n".join(parts) + "\n"


_STEP_CAPTION = (
    "Wall time of a step; in brackets as a ratio to the bare torch loop (the first column) in the same round, median"
    " (quartiles). = : ends at the first column's parameters bit for bit; otherwise the largest difference of any"
    " parameter. Both clip the gradient and use fused AdamW."
)


# ---------------------------------------------------------------------- goals


def rows(results: Results) -> list[Row]:
    """The goals, and what stands beside them."""
    found = []
    for part, system, base, goal in (
        ("GPT", TRAINLOOP, BARE_TORCH, 1.005),
        ("GPT", FOUR_HOOKS, BARE_TORCH, None),
        (COMPILED_GPT, TRAINLOOP, BARE_TORCH, 1.005),
        ("launch-bound", TRAINLOOP, BARE_TORCH, 1.02),
        ("launch-bound", TRAINLOOP, BARE_ACCELERATE, 1.0),
        ("launch-bound", FOUR_HOOKS, BARE_TORCH, None),
        (LAUNCHED, TRAINLOOP, BARE_TORCH, None),
        ("deterministic", DETERMINISTIC, TRAINLOOP, None),
    ):
        measured = results.steps[part][1] if part in results.steps else {}
        own, other = measured.get(system.title), measured.get(base.title)
        if own and other and own.wall and len(own.wall) == len(other.wall):
            found.append(_ratio(f"step, {part}: {system.title} to {base.title}", own.wall, other.wall, goal))
    for name, gap in results.gaps.items():
        if gap["idle_us"]:
            low, middle, high = quartiles(gap["idle_us"])
            goal = 20.0 if name.endswith(f": {TRAINLOOP.title}") else None
            found.append(Row(f"device idle between norm and update, us, {name}", middle, (low, high), goal))
    saves = results.saves.get("saves", {})
    for name, base, goal in (
        ("trainloop async", "copy into pinned memory", 1.3),
        ("trainloop async", "DCP async_save", None),
        ("trainloop", "DCP save", None),
    ):
        own_blocked, other_blocked = ([blocked for blocked, _ in saves.get(key, [])[1:]] for key in (name, base))
        count = min(len(own_blocked), len(other_blocked))
        if count:
            what = f"save, blocked: {name} to {base}"
            found.append(_ratio(what, own_blocked[:count], other_blocked[:count], goal))
    for name, share in results.saves.get("peaks", {}).items():
        found.append(Row(f"peak device memory of a save, share of the model: {name}", share, None, 0.02))
    for model, seconds in results.averages.items():
        what = f"average of the weights, {model}: EmaHook to `_foreach_lerp_`"
        found.append(_ratio(what, seconds["EmaHook"], seconds["_foreach_lerp_ on cached lists"], None))
    return found


def _ratio(what: str, values: list[float], reference: list[float], goal: float | None) -> Row:
    low, middle, high = quartiles(ratios(values, reference))
    return Row(what, middle, (low, high), goal)


# ---------------------------------------------------------------------- tables


def steps_table(results: Results) -> str:
    titles = list(dict.fromkeys(title for _, measured in results.steps.values() for title in measured))
    lines = []
    for part, (task, measured) in results.steps.items():
        base = next(iter(measured.values()))
        lines.append([part, *(_cell(task, measured.get(title), base, results.machine) for title in titles)])
    return table(["part", *titles], lines)


def _cell(task: Task, own: Measured | None, base: Measured, machine: dict[str, Any]) -> str:
    if own is None:
        return ""
    if own.error or not own.wall:
        return f"failed: {own.error[:60]}" if own.error else "no turn"
    milliseconds = quartiles(own.wall)[1] / task.num_steps * 1e3
    text = f"{milliseconds:.3f} ms"
    if task.model in TEXTS:
        _, length = TEXTS[task.model]
        text += f", {batch_size(task) * length / milliseconds * 1e3:,.0f} tokens/s"
    if (share := mfu(task, milliseconds / 1e3, machine)) is not None:
        text += f", MFU {share:.1%}"
    if own.device_memory:
        text += f", {own.device_memory / 2**30:.2f} GiB"
    if own is not base and len(own.wall) == len(base.wall):
        low, middle, high = quartiles(ratios(own.wall, base.wall))
        text += f" [{middle:.3f} ({low:.3f}-{high:.3f})]"
    equal = (
        "=" if own.difference == 0 else "not compared" if own.difference == float("inf") else f"{own.difference:.1g}"
    )
    return text if own is base else f"{text} {equal}"


def mfu(task: Task, seconds: float, machine: dict[str, Any]) -> float | None:
    """Share of the device's peak in bf16 that a step of this time uses; None: the peak or the operations are not
    known.
    """
    peak = next((peak for word, peak in PEAK_FLOPS.items() if word in machine["device"]), None)
    if peak is None or not task.model.startswith("GPT") or task.precision != "bf16":
        return None
    _, length = TEXTS[task.model]
    if task.model not in _flops:
        model: Any = make_model(task.model)
        _flops[task.model] = model.flops(batch_size(task), length)
    return _flops[task.model] / seconds / peak


_flops: dict[str, float] = {}


def gaps_table(gaps: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, gap in gaps.items():
        idle, span = (f"{quartiles(gap[key])[1]:.0f}" if gap[key] else "not found" for key in ("idle_us", "span_us"))
        lines.append([name, idle, span, f"{gap['host_waits_us']:.0f}", f"{gap['device_busy_us']:.0f}"])
    head = ["us a step", "device idle between norm and update", "from norm to update", "host waits", "device busy"]
    return table(head, lines)


def saves_table(saves: dict[str, Any]) -> str:
    lines = []
    for name, rounds in saves["saves"].items():
        steady = rounds[1:] or rounds
        blocked, whole = (quartiles(column)[1] for column in zip(*steady, strict=True))
        cells = (f"{seconds * 1e3:.1f} ms" for seconds in (rounds[0][0], blocked, whole))
        lines.append([name, *cells, f"{saves['bytes'] / blocked / 1e9:.1f}", str(len(rounds))])
    head = [f"{saves['bytes'] / 1e6:.0f} MB", "first, blocked", "blocked", "whole", "GB/s while blocked", "rounds"]
    return table(head, lines)


def averages_table(averages: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        [model, name, f"{quartiles(seconds)[1] * 1e6:.0f} us"]
        for model, by_name in averages.items()
        for name, seconds in by_name.items()
    ]
    return table(["model", "update", "takes"], lines)
