"""Draws the picture of the terminal in the README, from a real run: `python -m tests.terminal_picture`."""

from __future__ import annotations

import re
import sys
import tempfile
from html import escape

from .launching import REPOSITORY, environment
from .screens import BAR, Terminal

COLUMNS, ROWS = 112, 15
CHAR, LINE, MARGIN = 7.25, 18, 14  # px
COLORS = {
    "light": {"paper": "#f6f8fa", "text": "#24292f", "bar": "#0969da"},
    "dark": {"paper": "#161b22", "text": "#e6edf3", "bar": "#58a6ff"},
}


def main() -> None:
    """Run examples/diffusion.py until its second evaluation, and draw what the screen shows then."""
    with tempfile.TemporaryDirectory() as folder:
        example = ["examples/diffusion.py", "--max-steps", "2500", "--workspace", f"{folder}/runs"]
        with Terminal([sys.executable, *example], COLUMNS, ROWS, environment()) as run:
            run.wait_for(lambda: any(re.match(r"training 5[3-9]\d/", bar) for bar in run.bars()))
            lines = [re.sub(r"/\S+/runs", "runs", line) for line in run.lines()]
            bars = run.bars()
    rows = [line[i : i + COLUMNS] for line in lines for i in range(0, len(line), COLUMNS)]
    for scheme, colors in COLORS.items():
        path = REPOSITORY / "docs" / "assets" / f"terminal_{scheme}.svg"
        path.write_text(svg([f"$ python {example[0]}", *rows, "", *bars], colors), encoding="utf-8")


def svg(rows: list[str], colors: dict[str, str]) -> str:
    """The rows as a picture."""
    width, height = round(COLUMNS * CHAR + 2 * MARGIN), len(rows) * LINE + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="12">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{colors["paper"]}"/>',
    ]
    for i, row in enumerate(rows):
        fill = colors["bar"] if BAR.fullmatch(row) else colors["text"]
        place = f'x="{MARGIN}" y="{MARGIN + (i + 0.75) * LINE:.0f}" fill="{fill}" textLength="{len(row) * CHAR:.0f}"'
        if row:
            lines.append(f'<text {place} xml:space="preserve">{escape(row)}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
