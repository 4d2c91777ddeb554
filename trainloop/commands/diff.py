"""`trainloop diff`: finds the first step in which two runs differ."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..account.difference import compare_runs
from .parser import add_command


def add(areas: Any) -> None:
    """Add the command to the command line."""
    diff = add_command(
        areas,
        "diff",
        _diff,
        "the first step in which two runs differ, and their settings",
        "Compare two runs step by step, by the ledgers in their workspaces: the first step that differs, in which"
        " quantity and on which rank, and the settings that differ. Reads two folders, and writes nothing.",
        "exit codes: 0 the runs are the same; 1 they differ; 2 there is nothing to compare, or a wrong argument",
    )
    diff.add_argument("a", metavar="RUN_A", type=Path, help="workspace of a run")
    diff.add_argument("b", metavar="RUN_B", type=Path, help="workspace of another run")
    diff.add_argument("--json", action="store_true", help="print JSON")


def _diff(options: argparse.Namespace) -> int:
    difference = compare_runs(options.a, options.b)
    if options.json:
        found = difference.found
        told = {**asdict(difference), "quantity": found.quantity if found is not None else None}
        print(json.dumps(told, indent=1, default=str))
    else:
        print("\n".join(difference.text()))
    return 0 if difference.found is None else 1
