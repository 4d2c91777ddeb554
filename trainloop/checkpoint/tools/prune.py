"""Removes checkpoints that no policy keeps. Runs outside of a run, and takes the folder's lock."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import CheckpointError
from ..disk.fs import FileSystem
from ..disk.housekeeping import discard, point_latest, take_folder
from ..format.layout import LATEST, ManifestInfo
from ..format.verification import Verify
from ..retention import BestK, RetentionPolicy, read_policies, reasons_to_keep
from .survey import Finding, Leftover, examine, leftovers, run_retention, survey


@dataclass(frozen=True)
class Plan:
    """The actions of a pruning."""

    policies: Sequence[RetentionPolicy]
    reasons: dict[int, list[str]]
    """Why each intact checkpoint stays, by step, in the order of the commits. An empty list: it is removed."""
    stay: Sequence[Finding]
    go: Sequence[Finding]
    damaged: Sequence[Finding]
    """Damaged checkpoints. They are neither counted nor removed."""
    leftovers: Sequence[Leftover]
    """These are removed as well."""


def plan_pruning(
    root: Path, policies: Sequence[RetentionPolicy] | None, *, verify: Verify = "full", with_damaged: bool = False
) -> Plan:
    """Decide which checkpoints to remove. Changes nothing.

    Args:
        root: A folder of checkpoints.
        policies: Policies that choose checkpoints to keep, besides the newest and the newest healthy one. None: the
            run's own policies, from its newest manifest.
        verify: How thoroughly to verify the checkpoints that stay: a damaged one must not take the place of an intact
            one.
        with_damaged: Remove damaged ones too.

    Raises:
        CheckpointError: No checkpoint is intact, or the run's policies are unknown.
        ValueError: No checkpoint has a metric that one of `policies` needs.
    """
    findings = {finding.folder: finding for finding in survey(root, "size")}
    verified: set[Path] = set()
    while True:
        whole = {f.info.step: f for f in findings.values() if f.info is not None and not f.problems}
        damaged = [f for f in findings.values() if f.info is None or f.problems]
        if damaged and not whole:
            told = f"{damaged[-1].folder.name}: {damaged[-1].problems[0]}"
            raise CheckpointError(f"No checkpoint in {root} is whole, so none is removed: {told}")
        infos = [finding.info for finding in whole.values() if finding.info is not None]
        wanted = policies if policies is not None else _policies_of_run(root, list(findings.values()))
        _check_metrics(policies or (), infos)
        reasons = reasons_to_keep(infos, wanted)
        doubtful = {whole[step].folder for step, why in reasons.items() if why} - verified
        if not doubtful:
            break
        for folder in doubtful:
            finding = examine(folder, verify)
            if finding is None:
                del findings[folder]
            else:
                findings[folder] = finding
        verified |= doubtful
    stay = [whole[step] for step, why in reasons.items() if why]
    go = [whole[step] for step, why in reasons.items() if not why]
    if with_damaged:
        go, damaged = [*damaged, *go], []
    return Plan(wanted, reasons, stay, go, damaged, leftovers(root))


def prune(
    root: Path,
    policies: Sequence[RetentionPolicy] | None,
    *,
    verify: Verify = "full",
    with_damaged: bool = False,
    fs: FileSystem | None = None,
    logger: logging.Logger | None = None,
) -> Plan:
    """Do what `plan_pruning` decides. First, clean up after a run that died.

    Returns:
        The actions that were done.

    Raises:
        CheckpointError: A run holds the folder; or as `plan_pruning`. No checkpoint was removed then.
    """
    fs = fs if fs is not None else FileSystem()
    remains = leftovers(root)
    lock = take_folder(
        fs,
        root,
        logger if logger is not None else logging.getLogger("trainloop"),
        remedy="It removes by its own policies; wait for its end to remove by others",
    )
    try:
        plan = plan_pruning(root, policies, verify=verify, with_damaged=with_damaged)
        plan = replace(plan, leftovers=[leftover for leftover in remains if not os.path.lexists(leftover.path)])
        discard(fs, [finding.folder for finding in plan.go], lock.token)
        latest = root / LATEST
        if plan.reasons and latest.is_symlink() and not latest.exists():
            point_latest(fs, root, list(plan.reasons)[-1], lock.token)
    finally:
        lock.release()
    return plan


def _policies_of_run(root: Path, findings: Sequence[Finding]) -> list[RetentionPolicy]:
    described = run_retention(findings)
    if described is None and findings:
        raise CheckpointError(f"The newest checkpoint in {root} does not say what its run keeps. Give policies")
    policies, unknown = read_policies(described or ())
    if unknown:
        raise CheckpointError(
            f"The run keeps what {', '.join(unknown)} wants, which can only be asked in the run itself. Give policies"
        )
    return policies


def _check_metrics(policies: Sequence[RetentionPolicy], infos: Sequence[ManifestInfo]) -> None:
    """Raise for an unknown metric: a misspelt name would keep nothing."""
    there = sorted({name for info in infos for name in info.metrics})
    for policy in policies:
        if isinstance(policy, BestK) and infos and policy.metric not in there:
            raise ValueError(f"No checkpoint has the metric {policy.metric!r}, only: {', '.join(there) or 'none'}")
