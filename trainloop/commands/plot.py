"""`trainloop plot`: the curves of one or several runs, as a picture or a page."""

from __future__ import annotations

import argparse
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .curves import Panel, Run, choose_panels, draw_panel, read_runs
from .parser import add_command
from .pictures import DARK, LIGHT, make_figure

_PICTURES = (".png", ".svg", ".pdf")
_PANEL = (5.6, 3.2)  # inches
_ASKED_BY = "trainloop plot"


def add(areas: Any) -> None:
    """Add the command to the command line."""
    plot = add_command(
        areas,
        "plot",
        _plot,
        "the curves of runs: loss, validation, gradient norm, learning rate, throughput",
        "Draw what MetricsFileHook has written, of one run or of several over each other, with their restarts,"
        " checkpoints and discarded windows. May be called while the run goes on.",
    )
    plot.add_argument("workspaces", metavar="WORKSPACE", type=Path, nargs="+", help="that the trainers were given")
    plot.add_argument(
        "--metric",
        metavar="NAME",
        action="append",
        default=[],
        help='draw this metric, for example "val/accuracy" or "val/*"; may be given several times, a panel each',
    )
    plot.add_argument(
        "--out", metavar="FILE", type=Path, help="a .png, .svg, .pdf or .html file (default: plot.png in this folder)"
    )
    plot.add_argument("--html", action="store_true", help="one page that opens without a server (default: plot.html)")
    plot.add_argument("--dark", action="store_true", help="a dark background; a page goes by the reader's setting")


def _plot(options: argparse.Namespace) -> int:
    out = options.out or Path("plot.html" if options.html else "plot.png")
    suffixes = (".html",) if options.html else (*_PICTURES, ".html")
    if out.suffix not in suffixes:
        raise ValueError(f"--out must be a file that ends in {' or '.join(suffixes)}, but is {out}")
    runs = read_runs(options.workspaces)
    panels, left_out = choose_panels(runs, options.metric)
    if out.suffix == ".html":
        out.write_text(page(runs, panels), encoding="utf-8")
    else:
        _draw(runs, panels, out, is_dark=options.dark)
    print(f"Wrote {out}.")
    if left_out and not options.metric:
        print(f"Not drawn; --metric NAME draws them: {', '.join(sorted(left_out))}")
    return 0


def _draw(runs: Sequence[Run], panels: Sequence[Panel], out: Path, *, is_dark: bool) -> None:
    theme = DARK if is_dark else LIGHT
    num_columns = 1 if len(panels) == 1 else 2
    num_rows = -(-len(panels) // num_columns)
    figure = make_figure((_PANEL[0] * num_columns, _PANEL[1] * num_rows), theme, _ASKED_BY)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for i, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        draw_panel(ax, panel, runs, theme, has_marks=i == 0)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.savefig(out, dpi=150, facecolor=theme.background)


# ---------------------------------------------------------------------- the page

_STYLE = """
:root { color-scheme: light dark; --background: BACKGROUND_LIGHT; --text: TEXT_LIGHT; --line: LINE_LIGHT;SERIES_LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --background: BACKGROUND_DARK; --text: TEXT_DARK; --line: LINE_DARK;SERIES_DARK }
}
body { background: var(--background); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  padding: 1rem; max-width: 1500px; box-sizing: border-box }
h1 { font-size: 1.3rem; margin: 0 0 .6rem }
.table { overflow-x: auto }
table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)) }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .4rem }
figure svg { width: 100%; height: auto; display: block }
figure svg text { font-family: system-ui, sans-serif }
"""


def page(runs: Sequence[Run], panels: Sequence[Panel]) -> str:
    """One HTML page that needs no other file. It is light or dark, like the reader's system."""
    title = html.escape(", ".join(run.name for run in runs))
    figures = "\n".join(
        f'<figure aria-label="{html.escape(panel.title)}">{_svg(panel, runs, has_marks=i == 0)}</figure>'
        for i, panel in enumerate(panels)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_style()}</style>
</head>
<body>
<h1>{title}</h1>
<div class="table">{_table(runs)}</div>
<div class="panels">
{figures}
</div>
</body>
</html>
"""


def _style() -> str:
    style = _STYLE
    for name, theme in (("LIGHT", LIGHT), ("DARK", DARK)):
        series = "".join(f" --series-{i}: {colour};" for i, colour in enumerate(theme.series))
        for word, value in (
            ("BACKGROUND", theme.background),
            ("TEXT", theme.text),
            ("LINE", theme.line),
            ("SERIES", series),
        ):
            style = style.replace(f"{word}_{name}", value)
    return style


def _svg(panel: Panel, runs: Sequence[Run], *, has_marks: bool) -> str:
    """A panel as inline SVG. Its colours are variables of the page."""
    figure = make_figure(_PANEL, LIGHT, _ASKED_BY)
    import matplotlib

    draw_panel(figure.subplots(), panel, runs, LIGHT, has_marks=has_marks)
    content = io.StringIO()
    # Identifiers must differ between panels, because all panels are in one page. Text stays text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure.savefig(content, format="svg", facecolor=LIGHT.background, metadata={"Date": None})
    svg = content.getvalue()
    svg = re.sub(r'width="[^"]*pt" height="[^"]*pt" ', "", svg[svg.index("<svg") :], count=1)
    variables = {LIGHT.background: "background", LIGHT.text: "text", LIGHT.line: "line"}
    variables |= {colour: f"series-{i}" for i, colour in enumerate(LIGHT.series)}
    for colour, variable in variables.items():
        svg = re.sub(re.escape(colour), f"var(--{variable})", svg, flags=re.IGNORECASE)
    return svg


def _table(runs: Sequence[Run]) -> str:
    head = ("run", "last step", "of", "starts", "retries", "checkpoints", "last loss")
    rows = []
    for run in runs:
        known = bool(run.lives)
        _, losses = run.curves.get("train/loss", ([], []))
        cells = [
            run.name,
            f"{run.last_step:,}",
            f"{run.lives[-1].max_steps:,}" if known and run.lives[-1].max_steps else "—",
            f"{len(run.lives)}" if known else "—",
            f"{len(run.retries)}" if known else "—",
            f"{len(run.checkpoints)}" if known else "—",
            f"{losses[-1]:.4g}" if losses else "—",
        ]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{body}</table>"
