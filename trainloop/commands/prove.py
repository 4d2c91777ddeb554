"""`trainloop prove`: a short run of a trainer, killed and resumed, in one process and in several."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.tools.report import size
from ..testing.proof import MIN_STEPS, STRATEGIES, Proof, prove
from ..testing.subject import Subject, find_function
from .parser import add_command


def add(areas: Any) -> None:
    """Add the command to the command line."""
    command = add_command(
        areas,
        "prove",
        _prove,
        "run your trainer for a few steps, kill and resume it, and compare, at one and several processes",
        "Prove of your own trainer: killed and resumed, it ends with the same bits as undisturbed, in one process and"
        " in N; and N processes train as one does. Measures saves, memory and speed on the way. The trainer gets"
        " --steps steps, and checkpoints where they are needed; hooks that send numbers to trackers are left out."
        " Options of `accelerate launch` come last, after --: trainloop prove train.py:make_trainer -- --config_file"
        " fsdp.yaml",
        "exit codes: 0 all was shown; 1 something was not; 2 the command line is wrong, or there is no such trainer",
    )
    command.add_argument(
        "trainer",
        metavar="MODULE:FUNCTION",
        help="makes the trainer for the workspace that it is given; or FILE.py:FUNCTION, or a class of trainer",
    )
    command.add_argument("--processes", metavar="N", type=int, default=2, help="(default: 2)")
    command.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of the N processes (default: ddp)")
    command.add_argument("--steps", metavar="K", type=int, default=12, help="of each run (default: 12)")
    command.add_argument("--workspace", metavar="DIR", type=Path, help="keep the runs here (default: remove them)")
    command.add_argument("--timeout", metavar="S", type=float, default=600.0, help="of one life (default: 600 s)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(launch=[])


def split_launch_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after a "--". argparse would mix them up with the positional arguments."""
    own = list(arguments)
    if own[:1] != ["prove"] or "--" not in own:
        return own, []
    place = own.index("--")
    return own[:place], own[place + 1 :]


def _prove(options: argparse.Namespace) -> int:
    if options.steps < MIN_STEPS:
        raise ValueError(f"--steps must be at least {MIN_STEPS}, but is {options.steps}")
    if options.processes < 1:
        raise ValueError(f"--processes must be at least 1, but is {options.processes}")
    find_function(options.trainer)  # before anything that takes time
    subject = Subject(options.trainer, options.steps, options.steps // 3)
    with tempfile.TemporaryDirectory() if options.workspace is None else nullcontext(options.workspace) as folder:
        if any(Path(folder, name).exists() for name in ("on_1", "as_one")):
            raise ValueError(f"--workspace must be a folder without an earlier proof, but {folder} has one")
        proof = prove(
            subject,
            Path(folder),
            num_processes=options.processes,
            strategy=options.strategy,
            launch_args=options.launch,
            timeout=options.timeout,
            tell=lambda text: print(f"  {text} …", file=sys.stderr, flush=True),
        )
    if options.json:
        told = {"held": proof.is_held, "checks": [asdict(check) for check in proof.checks], "numbers": proof.numbers}
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(page(options.trainer, proof)))
    return 0 if proof.is_held else 1


def page(name: str, proof: Proof) -> list[str]:
    """The proof as lines for people."""
    verdict = (
        "all was shown"
        if proof.is_held
        else "NOT shown: " + "; ".join(check.name for check in proof.checks if not check.is_held)
    )
    lines = [f"{name}: {verdict}", ""]
    for check in proof.checks:
        first, *rest = check.text.splitlines() or [""]
        lines.append(f"{'yes' if check.is_held else 'NO '}  {check.name}")
        lines += [f"     {line}" for line in (first, *rest)]
    rows = [
        ("a save", "save_bytes", size),
        ("  blocks the run for", "save_blocked_seconds", _seconds),
        ("  is durable after", "save_whole_seconds", _seconds),
        ("peak memory of a process", "peak_memory_bytes", size),
        ("peak memory of a device", "peak_device_memory_bytes", size),
        ("a step", "step_seconds", _seconds),
        ("samples a second", "samples_a_second", lambda value: f"{value:,.1f}"),
    ]
    columns = list(proof.numbers)
    if columns:
        table = [["", *columns]]
        for label, key, show in rows:
            values = [proof.numbers[column][key] for column in columns]
            if any(value is not None for value in values):
                table.append([label, *("—" if value is None else show(value) for value in values)])
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines.append("")
        for row in table:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
    return lines


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
