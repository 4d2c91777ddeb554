"""The results as one Markdown table (with what it rests on below it) and one picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .goals import Row, is_comparable, rows
from .growth import Growth
from .harness import BARE_TORCH, Measured, quartiles, ratios
from .suite import Results
from .tasks import Task

PEERS = ("lightning", "transformers", "pytorch-accelerated", "pytorch-ignite")
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def markdown(results: Results) -> str:
    """The table of goals, and the tables it rests on."""
    parts = [machine(), goals_table(rows(results))]
    if results.steps:
        parts += ["### Every step", _STEP_CAPTION, steps_table(results.steps)]
    if results.host_reads:
        parts += ["### Host reads of an optimizer step", reads_table(results.host_reads)]
    if results.checkpoint:
        parts += ["### Checkpoints", checkpoint_table(results.checkpoint)]
    if results.growth:
        parts += ["### Growth", "CPU time of a step beyond what it is compared with.", growth_table(results.growth)]
    return "\n\n".join(parts) + "\n"


_STEP_CAPTION = (
    "CPU time of a step as a ratio to the bare torch loop: median (quartiles) over the rounds, and the median of wall"
    " time in brackets. = : ends at the bare loop's parameters bit for bit; ~ : within 1e-6."
)


def machine() -> str:
    """What it ran on, in general words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    versions = []
    for package in ("torch", "accelerate", "safetensors", *PEERS):
        try:
            versions.append(f"{package} {importlib.metadata.version(package).split('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"Measured on {os.cpu_count()} cores of a virtual machine ({model}), Linux, no GPU; one thread a process;"
        f" Python {platform.python_version()}, {', '.join(versions)}."
    )


def goals_table(found: Iterable[Row]) -> str:
    lines = []
    for row in found:
        digits = 3 if row.goal is not None and round(row.goal, 2) != row.goal else 2
        spread = f" ({row.spread[0]:.{digits}f}-{row.spread[1]:.{digits}f})" if row.spread else ""
        goal = "" if row.goal is None else f"≤ {row.goal:.{digits}f}"
        lines.append([row.what, goal, f"{row.value:.{digits}f}{spread}", row.verdict, row.note])
    return table(["what", "goal", "value (quartiles)", "", "note"], lines)


def steps_table(steps: Sequence[tuple[Task, dict[str, Measured]]]) -> str:
    titles = list(dict.fromkeys(title for _, measured in steps for title in measured))
    lines = []
    for task, measured in steps:
        bare = measured[BARE_TORCH.title]
        microseconds = quartiles(bare.cpu)[1] / task.num_steps / task.world_size * 1e6
        kind = f"{task.model}, N={task.num_micro}" + (", bf16" if task.precision == "bf16" else "")
        kind += f", {task.strategy}" if task.strategy else ""
        cells = [_cell(measured.get(title), bare) for title in titles if title != BARE_TORCH.title]
        lines.append([kind, f"{microseconds:.0f} us", *cells])
    return table(["task", "bare torch, CPU", *(title for title in titles if title != BARE_TORCH.title)], lines)


def _cell(own: Measured | None, bare: Measured) -> str:
    if own is None:
        return ""
    if own.error:
        return "not installed" if "not installed" in own.error else f"failed: {own.error[:60]}"
    if not own.is_equal:
        return f"other parameters (by {own.difference:.1g})"
    low, middle, high = quartiles(ratios(own.cpu, bare.cpu))
    wall = quartiles(ratios(own.wall, bare.wall))[1]
    return f"{'=' if own.difference == 0 else '~'} {middle:.2f} ({low:.2f}-{high:.2f}) [{wall:.2f}]"


def reads_table(host_reads: dict[str, dict[int, Measured]]) -> str:
    counts = sorted({count for by_count in host_reads.values() for count in by_count})
    lines = [
        [name, *(f"{by_count[c].host_reads:.3g}" if not by_count[c].error else "-" for c in counts)]
        for name, by_count in host_reads.items()
    ]
    return table(["system", *(f"accumulation {count}" for count in counts)], lines)


def checkpoint_table(checkpoint: dict[str, Any]) -> str:
    lines = []
    for kind, timings in (("save", checkpoint["saves"]), ("load", checkpoint["loads"])):
        for name, rounds in timings.items():
            blocked, whole = (quartiles(column)[1] for column in zip(*rounds[1:], strict=True))
            lines.append(
                [f"{kind}: {name}", *(f"{seconds * 1e3:.0f} ms" for seconds in (rounds[0][0], blocked, whole))]
            )
    return table([f"{checkpoint['bytes'] / 1e6:.0f} MB, wall", "first, blocked", "blocked", "whole"], lines)


def growth_table(found: Iterable[Growth]) -> str:
    lines = []
    for growth in found:
        pairs = zip(growth.counts, growth.microseconds, strict=True)
        values = ", ".join(f"{count}: {microseconds:.0f}" for count, microseconds in pairs)
        lines.append([f"{growth.of} more", f"{growth.slope:.2f} us", values, growth.compared_with])
    return table(["one", "costs", "microseconds at each number", "beyond"], lines)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def embed(readme: Path, text: str) -> None:
    """Put the results between the two marks of a README."""
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def picture(results: Results, path: Path) -> None:
    """Ratios with their quartiles, a panel a model, and the growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(task.model for task, _ in results.steps if task.world_size == 1))
    num_columns = max(len(models), len(results.growth), 1)
    num_rows = 1 + bool(results.growth)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(4.2 * num_columns, 3.9 * num_rows), squeeze=False)
    for axis, model in zip(axes[0], models, strict=False):
        _ratio_panel(axis, results, model)
    for axis in axes[0][len(models) :]:
        axis.axis("off")
    for axis, growth in zip(axes[-1] if results.growth else [], results.growth, strict=False):
        axis.plot(growth.counts, growth.microseconds, "o-", color="tab:blue")
        axis.set(xlabel=f"number: {growth.of}", ylabel="us a step", title=f"{growth.slope:.2f} us for one more")
        axis.set_ylim(bottom=min(0.0, *growth.microseconds))
    figure.suptitle("CPU time of an optimizer step, to the bare torch loop (median and quartiles)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ratio_panel(axis: Any, results: Results, model: str) -> None:
    titles: list[str] = []
    for num_micro, color, shift in ((1, "tab:blue", -0.15), (4, "tab:orange", 0.15)):
        measured = results.step(model, num_micro)
        titles = titles or [title for title in measured if is_comparable(measured[title])]
        shown = [title for title in titles if title in measured and is_comparable(measured[title])]
        bounds = [quartiles(ratios(measured[title].cpu, measured[BARE_TORCH.title].cpu)) for title in shown]
        if not bounds:
            continue
        low, middle, high = (list(column) for column in zip(*bounds, strict=True))
        errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        places = [titles.index(title) + shift for title in shown]
        axis.errorbar(middle, places, xerr=errors, fmt="o", color=color, label=f"accumulation {num_micro}")
    axis.set_yticks(range(len(titles)), titles)
    axis.invert_yaxis()
    axis.axvline(1.0, color="0.6", linewidth=1)
    axis.set_title(model)
    axis.legend(loc="lower right", fontsize="small")
