"""Shared by all pictures: matplotlib, the colours of a light and a dark page, and the look of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FAILURE = "#D55E00"
MAX_POINTS = 4000  # of a curve


@dataclass(frozen=True)
class Theme:
    """Colours. Colour-blind people can distinguish those of a series."""

    background: str
    text: str
    line: str
    series: tuple[str, ...]
    failure: str = FAILURE


LIGHT = Theme("#ffffff", "#1f2328", "#d0d7de", ("#0072b2", "#d55e00", "#00805d", "#b5478f", "#8a6d00", "#5e4fa2"))
DARK = Theme("#0d1117", "#e6edf3", "#30363d", ("#56b4e9", "#ff8a4c", "#2fcb97", "#e5a0c9", "#e6c229", "#a99be8"))


def make_figure(size: tuple[float, float], theme: Theme, asked_by: str) -> Any:
    """An empty figure.

    Args:
        size: Width and height in inches.
        theme: Its colours.
        asked_by: The option or command that needs it, for the error.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as ex:
        raise ValueError(
            f"{asked_by} needs matplotlib. Install it with `pip install 'trainloop-accelerate[plot]'`"
        ) from ex
    return Figure(figsize=size, layout="constrained", facecolor=theme.background)


def style_axes(ax: Any, theme: Theme, grid: str = "both") -> None:
    """Give axes the colours of the theme, without a frame."""
    ax.set_facecolor(theme.background)
    ax.tick_params(colors=theme.text, which="both", labelsize=9)
    ax.grid(axis=grid, color=theme.line, linewidth=0.6)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.line)
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(theme.text)


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about `MAX_POINTS` points of a curve: the lowest and highest of each stretch, so that spikes stay."""
    size = 2 * -(-len(xs) // MAX_POINTS)
    if size <= 2:
        return list(xs), list(ys)
    kept: list[int] = []
    for start in range(0, len(xs), size):
        stretch = [i for i in range(start, min(start + size, len(xs))) if ys[i] == ys[i]]
        if stretch:
            kept += sorted({min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]
