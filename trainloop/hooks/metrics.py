"""Checks the names of metrics that a hook waits for: whether such a metric is logged at all."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..checkpoint import BestK, RetentionPolicy
from .evaluation import EvaluationHook

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


def is_misnamed(trainer: BaseTrainer, metric: str, logged: Collection[str]) -> bool:
    """Whether `metric` will probably never be logged. If there are `EvaluationHook`s: all of them have logged their
    numbers, and `metric` is not among them. If there are none: another logged name is almost the same.
    """
    if metric in logged:
        return False
    if any(isinstance(hook, EvaluationHook) for hook in trainer.hooks):
        return not _is_waiting_for_evaluation(trainer, logged)
    return bool(difflib.get_close_matches(metric, logged, cutoff=0.8))


def list_names(logged: Collection[str]) -> str:
    """The names of metrics, for a message."""
    return ", ".join(sorted(logged)) or "nothing"


def tell_missing_metrics(trainer: BaseTrainer, policies: Iterable[RetentionPolicy], logged: Collection[str]) -> bool:
    """Warn about each `BestK` whose metric was never logged. Call on rank 0, after a commit.

    Returns:
        Whether it has checked. It waits until each evaluation of the run has logged its numbers.
    """
    if _is_waiting_for_evaluation(trainer, logged):
        return False
    for policy in policies:
        if isinstance(policy, BestK) and policy.metric not in logged:
            trainer.logger.warning(
                f"Step {trainer.step}: {policy} finds no metric of that name. Logged so far: {list_names(logged)}."
                " No checkpoint is deleted by this rule until one has the metric."
            )
    return True


def _is_waiting_for_evaluation(trainer: BaseTrainer, logged: Collection[str]) -> bool:
    """Whether an `EvaluationHook` of the run has not logged its numbers yet."""
    prefixes = [hook.prefix for hook in trainer.hooks if isinstance(hook, EvaluationHook)]
    return not all(any(key.startswith(f"{prefix}/") for key in logged) for prefix in prefixes)
