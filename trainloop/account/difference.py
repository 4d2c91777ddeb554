"""Finds where two runs differ: step by step, by their ledgers, and in their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .audit import QUANTITIES, Audit, Difference, Expected, Result, ranks_text
from .ledger import LEDGER, ranks_in, read_ledger
from .lives import Life, read_lives


@dataclass(frozen=True)
class RunDifference:
    """The differences between two runs."""

    num_steps: int
    """Number of steps that both runs have."""
    steps: tuple[tuple[int, int], tuple[int, int]]
    """First and last step of each run."""
    world_sizes: tuple[int, int]
    found: Difference | None
    """The first difference. None: no step that both runs have differs."""
    ranks: tuple[int, ...]
    """Ranks on which this quantity of this step differs."""
    settings: Mapping[str, tuple[Any, Any]]
    """The settings that differ, including versions and hosts."""

    def text(self) -> list[str]:
        """Lines for people."""
        (first, last), others = self.steps, self.steps[1]
        lines = []
        if self.steps[0] != others:
            lines.append(f"A has steps {first} to {last}, B has {others[0]} to {others[1]}.")
        if self.world_sizes[0] != self.world_sizes[1]:
            lines.append(
                f"A was run by {self.world_sizes[0]} processes, B by {self.world_sizes[1]}: gradient norms may differ"
                " in their last bits, and losses are not compared."
            )
        if self.found is None:
            lines.append(
                f"The runs are the same in all {self.num_steps} steps that both have, bit by bit:"
                f" {', '.join(QUANTITIES)}."
            )
        else:
            found = self.found
            values = f": {found.was!r} in A, {found.now!r} in B" if found.order > 1 else ""
            lines.append(
                f"The first difference is in step {found.step}, {ranks_text(self.ranks)}: the {found.quantity}{values}."
            )
        if self.settings:
            rows = [("setting", "A", "B"), *((k, _shown(a), _shown(b)) for k, (a, b) in self.settings.items())]
            widths = [max(len(row[i]) for row in rows) for i in range(3)]
            lines.append("Settings that differ:")
            lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        else:
            lines.append("Their settings are the same.")
        return lines


def compare_runs(a: Path, b: Path) -> RunDifference:
    """Compare the last runs of two workspaces.

    Raises:
        ValueError: One has no ledger, or they have no step in common.
    """
    tables, sizes = zip(*(_read(path) for path in (a, b)), strict=True)
    results: list[Result] = []
    for rank in sorted(tables[0].keys() & tables[1].keys()):
        ours, theirs = tables[0][rank], tables[1][rank]
        ours.world_sizes = dict.fromkeys(ours.steps, sizes[1])  # so that the norms are compared in any case
        first_steps = dict(ours.steps)
        audit = Audit(ours, rank, sizes[1])
        for step, bits in sorted(theirs.steps.items()):
            audit.step(step, bits)
        for step, loss in theirs.losses.items():
            if step in first_steps and sizes[0] == sizes[1]:
                audit.loss(step, loss)
        results.append(audit.result())
        if rank == 0:
            num_steps = len(first_steps.keys() & theirs.steps.keys())
            ranges = ((min(first_steps), max(first_steps)), (min(theirs.steps), max(theirs.steps)))
    if not results or not num_steps:
        raise ValueError(f"{a} and {b} have no step in common in their ledgers")
    result = Result.joined(results)
    found = result.difference
    ranks = () if found is None else tuple(d.rank for d in result.differences if d.order == found.order)
    return RunDifference(num_steps, ranges, (sizes[0], sizes[1]), found, ranks, _settings(a, b))


def _read(workspace: Path) -> tuple[dict[int, Expected], int]:
    """The steps of the last run by rank, and the number of processes in its last life."""
    folder = workspace / LEDGER
    tables, world_size = {}, 1
    for rank in ranks_in(folder):
        lives = read_ledger(folder, rank)
        if lives:
            own = [life for life in lives if life.first_life == lives[-1].first_life]
            expected = Expected.of(own, 0)
            if expected.steps:
                tables[rank] = expected
                world_size = own[-1].world_size if rank == 0 else world_size
    if not tables:
        raise ValueError(f"{workspace} has no ledger of a run: there is no record in {folder}")
    return tables, world_size


def _settings(a: Path, b: Path) -> dict[str, tuple[Any, Any]]:
    of = [_all_settings(lives[-1]) if (lives := read_lives(path)) else {} for path in (a, b)]
    keys = [key for key in of[0] if key in of[1]]
    return {key: (of[0][key], of[1][key]) for key in keys if of[0][key] != of[1][key]}


def _all_settings(life: Life) -> dict[str, Any]:
    return {"hosts": ", ".join(sorted(life.hosts)), **life.versions, **life.settings}


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
