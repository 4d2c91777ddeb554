"""`trainloop runs`: the lives of a run, and how its time was spent."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..account.survey import runs_json, runs_text, survey_runs
from .parser import add_command

_SUFFIXES = (".png", ".svg")


def add(areas: Any) -> None:
    """Add the command to the command line."""
    runs = add_command(
        areas,
        "runs",
        _runs,
        "the lives of a run: how far each came, why it ended, and where the time went",
        "List the lives of a run: when and where, from which step to which, why each ended, and whether the steps that"
        " it did again had the same bits. Then sort every second from the first start to the last end. Writes nothing"
        " to the workspace, so it may be called while the run goes on.",
    )
    runs.add_argument("workspace", metavar="WORKSPACE", type=Path, help="the folder that the trainer was given")
    runs.add_argument("--json", action="store_true", help="print JSON")
    runs.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw the lives over time, and the loss, into a .png or .svg file; of several runs, the last one",
    )
    runs.add_argument("--dark", action="store_true", help="--plot on a dark background")


def _runs(options: argparse.Namespace) -> int:
    if options.plot is not None and options.plot.suffix not in _SUFFIXES:
        raise ValueError(f"--plot must be a file that ends in {' or '.join(_SUFFIXES)}, but is {options.plot}")
    runs = survey_runs(options.workspace)
    if options.plot is not None:
        from .runs_plot import draw

        draw(runs[-1], options.workspace, options.plot, is_dark=options.dark)
    print(json.dumps(runs_json(runs), indent=1) if options.json else "\n".join(runs_text(runs)))
    return 0
