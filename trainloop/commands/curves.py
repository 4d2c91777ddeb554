"""The curves of runs, from their metrics files and events: chooses the panels and draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..account.lives import Life, read_lives, split_runs
from ..account.metrics import read_metrics
from .pictures import Theme, style_axes, thinned

_MAX_PANELS = 12
_MAX_MARKS = 200
_RATIO_FOR_LOG = 20.0  # of the highest to the lowest value
_THROUGHPUT = ("throughput/samples_per_second", "throughput/weight_per_second")
_STEP_TIME = "train/step_time"
_SPEEDS = {_THROUGHPUT[0]: "samples per second", _THROUGHPUT[1]: "weight per second", _STEP_TIME: "seconds per step"}
_STYLES = ("-", "--", ":", "-.")


@dataclass
class Run:
    """The data of a run that is drawn."""

    name: str
    curves: dict[str, tuple[list[float], list[float]]]
    """Steps and values, by the name of the metric."""
    lives: Sequence[Life] = ()
    restarts: list[int] = field(default_factory=list)
    """The steps from which the later lives resumed."""
    retries: list[int] = field(default_factory=list)
    """Steps that needed several windows."""
    checkpoints: list[int] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step with a number."""
        return int(max(steps[-1] for steps, _ in self.curves.values()))


@dataclass(frozen=True)
class Panel:
    """A group of metrics that are drawn over each other."""

    title: str
    names: tuple[str, ...]


def read_runs(workspaces: Sequence[Path]) -> list[Run]:
    """Read the runs in some workspaces.

    Raises:
        ValueError: One has no metrics.
    """
    names = [workspace.resolve().name for workspace in workspaces]
    if len(set(names)) < len(names):
        names = [str(workspace) for workspace in workspaces]
    return [_read_run(workspace, name) for workspace, name in zip(workspaces, names, strict=True)]


def _read_run(workspace: Path, name: str) -> Run:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(workspace):
        for metric, value in row.items():
            if metric not in ("step", "time"):
                steps, values = curves.setdefault(metric, ([], []))
                steps.append(row["step"])
                values.append(value if math.isfinite(value) else math.nan)
    if not curves:
        raise ValueError(
            f"{workspace} has no metrics. Return `MetricsFileHook()` from `build_hooks`, with `LoggingHook()` for the"
            " numbers of the training, and run the trainer again"
        )
    run = Run(name, curves)
    runs = split_runs(read_lives(workspace))
    if runs:
        run.lives = runs[-1]
        run.restarts = [life.start_step for life in run.lives[1:] if life.ready is not None]
        events = [event for life in run.lives for event in life.events if isinstance(event.get("step"), int)]
        run.retries = sorted({e["step"] for e in events if e["event"] == "discarded" and e.get("retries")})
        run.checkpoints = sorted({e["step"] for e in events if e["event"] == "save"})
    return run


def choose_panels(runs: Sequence[Run], patterns: Sequence[str]) -> tuple[list[Panel], list[str]]:
    """Choose the panels. Returns them, and the names that no panel shows.

    Args:
        runs: The runs.
        patterns: Names of metrics, such as "val/*", one panel each. Empty: loss, validation, learning rate, gradient
            norm and throughput, if they exist.

    Raises:
        ValueError: A pattern matches no name.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    if patterns:
        panels = []
        for pattern in patterns:
            found = tuple(name for name in names if fnmatchcase(name, pattern))
            if not found:
                raise ValueError(f"--metric {pattern} fits no metric. There are: {', '.join(sorted(names))}")
            panels.append(Panel(found[0] if len(found) == 1 else pattern, found))
        return panels, []
    others = [name for name in names if not name.startswith(("train/", "throughput/"))]
    losses = [name for name in names if name == "train/loss"] + [name for name in others if name.endswith("/loss")]
    speeds = [name for name in _THROUGHPUT if name in names] or [name for name in names if name == _STEP_TIME]
    wanted = [
        ("loss", losses),
        *((name, [name]) for name in others if name not in losses),
        ("gradient norm", [name for name in names if name == "train/grad_norm"]),
        ("learning rate", [name for name in names if name.startswith("train/lr/")]),
        (_SPEEDS.get(speeds[0], "throughput") if len(speeds) == 1 else "throughput", speeds),
    ]
    panels = [Panel(title, tuple(found)) for title, found in wanted if found]
    if len(panels) > _MAX_PANELS:
        last = panels[len(panels) - 3 :]
        panels = panels[: _MAX_PANELS - 3] + last
    shown = {name for panel in panels for name in panel.names}
    return panels, [name for name in names if name not in shown]


def draw_panel(ax: Any, panel: Panel, runs: Sequence[Run], theme: Theme, *, has_marks: bool) -> None:
    """Draw a panel.

    Args:
        ax: The matplotlib axes.
        panel: The panel.
        runs: The runs, each with a colour. If there is only one, each metric has a colour.
        theme: The colours.
        has_marks: Whether checkpoints and retries are marked too. Restarts always are.
    """
    drawn: list[float] = []
    for i, run in enumerate(runs):
        for j, name in enumerate(name for name in panel.names if name in run.curves):
            steps, values = run.curves[name]
            colour = theme.series[(i if len(runs) > 1 else j) % len(theme.series)]
            style = _STYLES[(j if len(runs) > 1 else j // len(theme.series)) % len(_STYLES)]
            marker = "o" if len(steps) <= 30 else ""
            parts = [run.name] if len(runs) > 1 else []
            parts += [name] if len(panel.names) > 1 or len(runs) == 1 else []
            label = " · ".join(parts)
            ax.plot(
                *thinned(steps, values), style, color=colour, marker=marker, markersize=3, linewidth=1.4, label=label
            )
            drawn += [value for value in values if not math.isnan(value)]
        _draw_marks(ax, run, theme, theme.text if len(runs) == 1 else theme.series[i % len(theme.series)], has_marks)
    is_wide = drawn and min(drawn) > 0 and max(drawn) / min(drawn) > _RATIO_FOR_LOG
    if is_wide:
        ax.set_yscale("log")
    ax.set_title(panel.title, fontsize=11, loc="left", fontweight="bold", color=theme.text)
    ax.set_xlabel("step", fontsize=9)
    style_axes(ax, theme)
    by_label = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # one entry per mark for all runs
    if len(by_label) > 1:
        place = {"loc": "upper left", "bbox_to_anchor": (0, -0.2), "borderaxespad": 0.0}
        legend = ax.legend(by_label.values(), by_label, ncols=3, fontsize=8, frameon=False, **place)
        for text in legend.get_texts():
            text.set_color(theme.text)


def _draw_marks(ax: Any, run: Run, theme: Theme, colour: str, has_marks: bool) -> None:
    across = ax.get_xaxis_transform()
    for i, step in enumerate(_some(run.restarts)):
        label = "restart" if has_marks and i == 0 else None
        ax.axvline(step, color=colour, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.7, label=label)
    if not has_marks:
        return
    marks = ((run.checkpoints, "|", 0.03, colour, "checkpoint"), (run.retries, "^", 0.08, theme.failure, "retry"))
    for steps, marker, height, of, label in marks:
        if steps:
            shown = _some(steps)
            style = {"color": of, "markersize": 6, "alpha": 0.8, "linestyle": "none"}
            ax.plot(shown, [height] * len(shown), marker=marker, transform=across, label=label, **style)


def _some(steps: Sequence[int]) -> Sequence[int]:
    return steps[:: -(-len(steps) // _MAX_MARKS) or 1]
