"""The runs in a workspace, for `trainloop runs`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .events import EVENTS
from .goodput import CATEGORIES, goodput
from .ledger import LEDGER, Ledger
from .lives import Life, read_lives, split_runs
from .process import process_start

RUNNING = "running"
_SAME_PROCESS_SECONDS = 2.0
_NUM_HOSTS = 3


def survey_runs(workspace: Path) -> list[list[Life]]:
    """The lives of each run in a workspace. If the last one has recorded no end, its ledger and process are checked.

    Raises:
        ValueError: There is no events file, or no life in it.
    """
    lives = read_lives(workspace)
    if not lives:
        raise ValueError(f"{workspace} has no account of a run: its {EVENTS} is missing or empty")
    last = lives[-1]
    if last.reason == "killed":
        written, step = Ledger(workspace / LEDGER, 0).last_word()
        if written >= last.begun:
            last.ended, last.step = max(last.ended, written), max(last.step, step)
        if _is_alive(last):
            last.reason, last.ended = RUNNING, time.time()
    return split_runs(lives)


def _is_alive(life: Life) -> bool:
    """Whether the process of rank 0 still exists, if it runs on this host."""
    if life.host != platform.node() or not life.pid:
        return False
    try:
        os.kill(life.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = process_start(life.pid)
    return started is None or abs(started - life.events[0].get("started", started)) < _SAME_PROCESS_SECONDS


def runs_json(runs: Sequence[Sequence[Life]]) -> list[dict[str, Any]]:
    """The runs as JSON: times in seconds since 1970."""
    return [
        {
            "lives": [
                {
                    "life": life.number,
                    "started": life.started,
                    "ready": life.ready,
                    "ended": life.ended,
                    "hosts": dict(life.hosts),
                    "processes": life.num_processes,
                    "version": life.version,
                    "first_step": life.start_step,
                    "last_step": life.step,
                    "reason": life.reason,
                    "detail": life.detail,
                    "again": again_text(life, highest),
                    "audits": [event for event in life.events if event["event"] == "audit"],
                    "discarded": sum(event.get("retries", 0) for event in life.events),
                }
                for life, highest in _with_highest(run)
            ],
            "seconds": (seconds := goodput(run)),
            "whole_seconds": run[-1].ended - run[0].started,
            "goodput": seconds["training"] / max(sum(seconds.values()), 1e-9),
        }
        for run in runs
    ]


def runs_text(runs: Sequence[Sequence[Life]]) -> list[str]:
    """The runs for people: a table of each run's lives, and how its time was spent."""
    lines: list[str] = []
    for number, run in enumerate(runs, 1):
        last = run[-1]
        of = f"Run {number} of {len(runs)}" if len(runs) > 1 else "The run"
        at = f"step {last.step} of {last.max_steps}" if last.max_steps else f"step {last.step}"
        lives = f"{len(run)} {'lives' if len(run) > 1 else 'life'}"
        lines += ([""] if lines else []) + [f"{of}: {lives}, at {at}, {reason_text(last)}", ""]
        rows = [("life", "started", "lasted", "hosts", "steps", "done again", "end")]
        for life, highest in _with_highest(run):
            rows.append(
                (
                    str(life.number),
                    datetime.fromtimestamp(life.started).strftime("%Y-%m-%d %H:%M:%S"),
                    _seconds_text(life.ended - life.started),
                    hosts_text(life),
                    f"{life.start_step} → {life.step}" if life.ready is not None else "—",
                    again_text(life, highest),
                    reason_text(life),
                )
            )
        lines += _table(rows)
        seconds, whole = goodput(run), max(last.ended - run[0].started, 1e-9)
        shares = [(name, _seconds_text(seconds[name]), f"{seconds[name] / whole:.1%}") for name in CATEGORIES]
        lines += ["", *_table([*shares, ("total", _seconds_text(whole), "100.0%")], right=(1, 2))]
    return lines


def _with_highest(run: Sequence[Life]) -> list[tuple[Life, int]]:
    """The lives, each with the highest step of the earlier ones."""
    highest, pairs = 0, []
    for life in run:
        pairs.append((life, highest))
        highest = max(highest, life.step)
    return pairs


def reason_text(life: Life) -> str:
    """Why a life ended."""
    if life.reason == "killed":
        return "killed: its end was not recorded"
    return f"{life.reason}: {life.detail}" if life.detail else life.reason


def hosts_text(life: Life) -> str:
    """For example "n0 8, n1 8"."""
    shown = [f"{host} {count}" for host, count in list(life.hosts.items())[:_NUM_HOSTS]]
    return ", ".join(shown) + (f", … ({life.num_processes})" if len(life.hosts) > _NUM_HOSTS else "")


def again_text(life: Life, highest: int) -> str:
    """The steps that a life has repeated, and the result of comparing them."""
    last = min(life.step, highest)
    if last <= life.start_step:
        return ""
    steps = f"{life.start_step + 1} to {last}" if last > life.start_step + 1 else str(last)
    audit = next((event for event in life.events if event["event"] == "audit"), None)
    if audit is None:
        return f"{steps}: not compared"
    if audit.get("same"):
        others = " up to rounding" if audit.get("processes_before") else ""
        return f"{steps}: the same{others}"
    if not audit.get("comparable", True):
        return f"{steps}: other batches"
    return f"{steps}: {audit.get('quantity')} differs in step {audit.get('step')}, rank {audit.get('rank')}"


def _seconds_text(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
