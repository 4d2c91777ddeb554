"""Formats a folder of checkpoints: lines for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..format.layout import parse_step_name
from ..retention import read_policies, reasons_to_keep
from .prune import Plan
from .survey import Finding, Leftover, run_retention


def listing(
    findings: Sequence[Finding], leftovers: Sequence[Leftover], metrics: Sequence[str] | None, now: float
) -> list[str]:
    """A table of checkpoints. Below it, their problems and the leftovers in the folder.

    Args:
        findings: The checkpoints, from the oldest commit to the newest.
        leftovers: The leftovers in the folder.
        metrics: Names of the metrics to show. None: all that are not under "train/".
        now: Seconds since 1970.
    """
    names = _metric_names(findings) if metrics is None else metrics
    kept_by, unknown = _kept_by(findings)
    rows = [["step", "age", "size", "health", *names, "kept by"]]
    for finding in findings:
        info, values = finding.info, finding.info.metrics if finding.info is not None else {}
        rows.append(
            [
                str(parse_step_name(finding.folder.name)),
                duration(now - info.time) if info is not None else "-",
                size(finding.num_bytes),
                finding.state,
                *(f"{values[name]:.4g}" if name in values else "-" for name in names),
                ", ".join(kept_by[finding.folder.name]) or "-",
            ]
        )
    lines = _table(rows, num_right=3) if findings else []
    lines += [f"{f.folder.name} is {f.state}: {'; '.join(f.problems)}" for f in findings if f.problems]
    for leftover in leftovers:
        about = f"{size(leftover.num_bytes)}, written {duration(now - leftover.time)} ago"
        lines.append(f"{leftover.path.name} is {leftover.what} ({about})")
    if unknown:
        lines.append(f"What {', '.join(unknown)} keeps can only be asked in the run itself.")
    return lines


def listing_json(
    findings: Sequence[Finding], leftovers: Sequence[Leftover], metrics: Sequence[str] | None
) -> dict[str, Any]:
    """The same as JSON: sizes in bytes, times in seconds since 1970, all metrics or those that are named. A metric that
    is not finite is a string ("nan", "inf", "-inf"), because JSON has no such number.
    """
    kept_by, _ = _kept_by(findings)
    checkpoints = []
    for finding in findings:
        info = finding.info
        entry: dict[str, Any] = {
            "name": finding.folder.name,
            "step": parse_step_name(finding.folder.name),
            "health": finding.state,
            "problems": list(finding.problems),
            "num_bytes": finding.num_bytes,
            "kept_by": kept_by[finding.folder.name],
        }
        if info is not None:
            entry |= {"seq": info.seq, "run_id": info.run_id, "time": info.time, "world_size": info.world_size}
            entry["metrics"] = {
                name: value if math.isfinite(value) else str(value)
                for name, value in info.metrics.items()
                if metrics is None or name in metrics
            }
        checkpoints.append(entry)
    others = [
        {"name": item.path.name, "what": item.what, "num_bytes": item.num_bytes, "time": item.time}
        for item in leftovers
    ]
    return {"checkpoints": checkpoints, "leftovers": others, "retention": run_retention(findings)}


def pruning(plan: Plan) -> list[str]:
    """A table of the checkpoints that stay, with the reasons, and of those that are removed."""
    rows = [
        ["stays", finding.folder.name, size(finding.num_bytes), ", ".join(plan.reasons[finding.info.step])]
        for finding in plan.stay
        if finding.info is not None
    ]
    for word, findings in (("stays", plan.damaged), ("goes", plan.go)):
        for finding in findings:
            why = f"{finding.state}: {'; '.join(finding.problems)}" if finding.problems else "no policy wants it"
            rows.append([word, finding.folder.name, size(finding.num_bytes), why])
    rows += [["goes", item.path.name, size(item.num_bytes), item.what] for item in plan.leftovers]
    return _table(rows, num_right=0) if rows else []


def size(num_bytes: float) -> str:
    """Bytes for people, for example "1.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people, for example "3 h": whole units, rounded down. Negative values become 0 s."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0) // 1:.0f} s"


def _kept_by(findings: Sequence[Finding]) -> tuple[dict[str, list[str]], list[str]]:
    """The policies that keep each checkpoint, by folder; and the policies that are unknown here."""
    policies, unknown = read_policies(run_retention(findings) or ())
    infos = [finding.info for finding in findings if finding.info is not None and not finding.problems]
    reasons = reasons_to_keep(infos, policies)
    return {
        finding.folder.name: reasons.get(finding.info.step, []) if finding.info is not None else []
        for finding in findings
    }, unknown


def _metric_names(findings: Sequence[Finding]) -> list[str]:
    names = {name for finding in findings if finding.info is not None for name in finding.info.metrics}
    return sorted(name for name in names if not name.startswith("train/"))


def _table(rows: Sequence[Sequence[str]], num_right: int) -> list[str]:
    """Lines with columns of equal width. The first `num_right` columns are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i < num_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
