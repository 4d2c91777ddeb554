"""Draws the picture of a run: its lives over time, and the loss below them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..account.goodput import again_until
from ..account.ledger import LEDGER, read_ledger
from ..account.lives import FAILURES, Life
from .pictures import DARK, FAILURE, LIGHT, Theme, make_figure, style_axes, thinned

_COLOURS = {  # Wong's colours: colour-blind people can distinguish them; legible on white and on black
    "done again": "#E69F00",
    "saving": "#009E73",
    "evaluating": "#CC79A7",
    "starting": "#999999",
}
_MAX_ROWS = 12  # lives that are named
_UNITS = ((3 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))


def draw(run: Sequence[Life], workspace: Path, path: Path, *, is_dark: bool = False) -> None:
    """Draw a run into a file.

    Args:
        run: Its lives.
        workspace: Its workspace, which has the ledger with the loss.
        path: A .png or .svg file.
        is_dark: Whether to use a dark background.

    Raises:
        ValueError: matplotlib is missing.
    """
    theme = DARK if is_dark else LIGHT
    start, end = run[0].started, run[-1].ended
    _, scale, unit = next(row for row in _UNITS if end - start >= row[0])
    losses = _losses(run, workspace)
    height = 0.7 + 0.35 * min(len(run), _MAX_ROWS)
    size = (9, height + (3.6 if losses else 1.2))
    figure = make_figure(size, theme, "--plot")
    ratios = [height, 2.4] if losses else [1.0]
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_lives(axes[0], run, start, scale, {**_COLOURS, "training": theme.series[0]})
    if losses:
        _draw_losses(axes[1], run, losses, start, scale, theme)
    for ax in axes:
        style_axes(ax, theme, grid="x")
    axes[-1].set_xlabel(f"{unit} since the first start")
    axes[-1].set_xlim(0, (end - start) / scale * 1.02)
    _add_legend(figure, axes[0], run, theme)
    figure.savefig(path, dpi=150, facecolor=theme.background)


def _draw_lives(ax: Any, run: Sequence[Life], start: float, scale: float, colours: dict[str, str]) -> None:
    for row, life in enumerate(run):
        for category, begin, end in _segments(life, run[:row]):
            left, width = (begin - start) / scale, max(end - begin, 0.0) / scale
            ax.barh(row, width, left=left, height=0.62, color=colours[category], linewidth=0)
        if life.reason in FAILURES:
            ax.plot((life.ended - start) / scale, row, "x", color=FAILURE, markersize=8, markeredgewidth=2)
    shown = range(0, len(run), -(-len(run) // _MAX_ROWS))
    ax.set_yticks(shown, [f"{run[row].number}: {run[row].start_step} → {run[row].step}" for row in shown])
    ax.set_ylabel("life: steps")
    ax.invert_yaxis()


def _segments(life: Life, before: Sequence[Life]) -> list[tuple[str, float, float]]:
    """Categories of a life, each with its begin and end. Later segments are drawn over earlier ones."""
    ready = life.ready if life.ready is not None else life.ended
    segments = [("starting", life.started, ready), ("training", ready, life.ended)]
    highest = max((other.step for other in before), default=0)
    if highest > life.start_step:
        reached = again_until(life)
        segments.append(("done again", ready, life.ended if reached is None else reached))
    for event in life.events:
        for kind, category in (("evaluation", "evaluating"), ("save", "saving")):
            if event["event"] == kind:
                segments.append((category, max(ready, event["time"] - event.get("seconds", 0.0)), event["time"]))
    return segments


def _losses(run: Sequence[Life], workspace: Path) -> dict[int, tuple[list[float], list[float]]]:
    """Times and losses of rank 0 by life, for lives with losses. The ledger has no times, so they are interpolated
    between the events.
    """
    curves = {}
    recorded = {life.number: life for life in read_ledger(workspace / LEDGER, 0)}
    for life in run:
        ledger = recorded.get(life.number)
        if life.ready is None or ledger is None or not ledger.losses:
            continue
        steps = [step for step in sorted(ledger.losses) if life.start_step < step <= life.step]
        marks = _marks(life)
        times = [_time_of(step, marks) for step in steps]
        curves[life.number] = thinned(times, [ledger.losses[step] for step in steps])
    return curves


def _marks(life: Life) -> list[tuple[int, float]]:
    """Steps with a known end time, ascending."""
    assert life.ready is not None
    marks = [(life.start_step, life.ready)]
    for event in life.events:
        step = event.get("step")
        is_over = event["event"] in ("progress", "save", "evaluation", "again", "end")
        if is_over and isinstance(step, int) and step > marks[-1][0]:
            marks.append((step, event["time"]))
    if life.step > marks[-1][0]:
        marks.append((life.step, life.ended))
    return marks


def _time_of(step: int, marks: Sequence[tuple[int, float]]) -> float:
    for (step_a, time_a), (step_b, time_b) in pairwise(marks):
        if step <= step_b:
            return time_a + (time_b - time_a) * (step - step_a) / (step_b - step_a)
    return marks[-1][1]


def _draw_losses(
    ax: Any,
    run: Sequence[Life],
    losses: dict[int, tuple[list[float], list[float]]],
    start: float,
    scale: float,
    theme: Theme,
) -> None:
    for times, values in losses.values():
        ax.plot([(time - start) / scale for time in times], values, color=theme.series[0], linewidth=1.4)
    for life in run[1:]:
        ax.axvline((life.started - start) / scale, color=theme.text, linewidth=0.8, linestyle=(0, (3, 3)))
    retries = [
        (event["time"] - start) / scale
        for life in run
        for event in life.events
        if event["event"] == "discarded" and event.get("retries")
    ]
    if retries:
        ax.plot(retries, [0.06] * len(retries), "^", color=FAILURE, markersize=7, transform=ax.get_xaxis_transform())
    if all(value > 0 for _, values in losses.values() for value in values):
        ax.set_yscale("log")
    ax.set_ylabel("loss (rank 0)")


def _add_legend(figure: Any, ax: Any, run: Sequence[Life], theme: Theme) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = {category for row, life in enumerate(run) for category, *_ in _segments(life, run[:row])}
    colours = {"training": theme.series[0], **_COLOURS}
    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in colours.items() if name in used]
    marker: dict[str, Any] = {"color": FAILURE, "linestyle": "none", "markeredgewidth": 2}
    if any(life.reason in FAILURES for life in run):
        handles.append(Line2D([], [], marker="x", label="failed", **marker))
    if any(event.get("retries") for life in run for event in life.events if event["event"] == "discarded"):
        handles.append(Line2D([], [], marker="^", label="window discarded", **marker))
    if len(run) > 1:
        handles.append(Line2D([], [], color=theme.text, linewidth=0.8, linestyle="--", label="restart"))
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(theme.text)
