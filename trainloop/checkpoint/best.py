"""Finds the checkpoint with the best value of a metric, for `load="best:val/loss"`. Pure functions over manifests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ..errors import CheckpointError
from .format.layout import ManifestInfo
from .retention import BestK, read_policies

Mode: TypeAlias = Literal["min", "max"]

_PREFIX = "best"


@dataclass(frozen=True)
class Best:
    """A request for the checkpoint with the best value of a metric."""

    metric: str | None = None
    """Name of the logged metric, "val/loss". None: the metric of the run's only `BestK`."""
    mode: Mode | None = None
    """Whether the lowest or the highest value is best. None: as in the run's `BestK` for the metric, else "min"."""

    @classmethod
    def parse(cls, metric: str) -> Best:
        """Parse "val/loss" or "val/accuracy:max".

        Raises:
            ValueError: It contains no metric name.
        """
        name, _, end = metric.rpartition(":")
        modes: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}
        best = cls(name, modes[end]) if end in modes and name else cls(metric)
        if not best.metric or best.metric in (":min", ":max"):
            raise ValueError(
                f'The best checkpoint is named as "val/loss" or "val/accuracy:max", but here as {metric!r}.'
            )
        return best


def parse_best(which: Any) -> Best | None:
    """Parse `"best"`, `"best:val/loss"` or `"best:val/accuracy:max"`. None: `which` is none of these.

    Raises:
        ValueError: No metric follows "best:".
    """
    if which == _PREFIX:
        return Best()
    if isinstance(which, str) and which.startswith(f"{_PREFIX}:"):
        return Best.parse(which.removeprefix(f"{_PREFIX}:"))
    return None


def choose_best(root: Path, infos: Sequence[ManifestInfo], best: Best) -> tuple[ManifestInfo, str]:
    """The requested checkpoint, and the reason for the choice, as a part of a sentence.

    A checkpoint with non-finite parameters is chosen only if no other one has the metric. If values are equal, the
    earlier commit is the best, as for `BestK`.

    Args:
        root: The folder, for the messages.
        infos: Its checkpoints, from the oldest commit to the newest.
        best: The request.

    Raises:
        CheckpointError: No checkpoint has the metric, or the request doesn't identify a metric.
    """
    policies = [policy for info in reversed(infos) for policy in read_policies(info.retention or ())[0]]
    own = [policy for policy in policies if isinstance(policy, BestK)]
    metric = best.metric if best.metric is not None else _only_metric(root, own)
    mode = best.mode or next((policy.mode for policy in own if policy.metric == metric), "min")
    having = [info for info in infos if not math.isnan(info.metrics.get(metric, math.nan))]
    if not having:
        logged = ", ".join(sorted({name for info in infos for name in info.metrics})) or "none"
        raise CheckpointError(
            f"{root} has no checkpoint with the metric {metric!r}. It has {len(infos)} checkpoints, with the metrics:"
            f" {logged}"
        )
    sign = 1 if mode == "min" else -1
    chosen = min(having, key=lambda info: (not info.health, sign * info.metrics[metric], info.seq))
    rank = "lowest" if mode == "min" else "highest"
    return chosen, f"its {metric} of {chosen.metrics[metric]:.6g} is the {rank} of {len(having)} checkpoints"


def _only_metric(root: Path, policies: Sequence[BestK]) -> str:
    metrics = sorted({policy.metric for policy in policies})
    if len(metrics) != 1:
        found = f"its run kept checkpoints by {' and '.join(metrics)}" if metrics else "its run had no `BestK`"
        raise CheckpointError(
            f'"best" does not say which checkpoint of {root} it is: {found}. Name it: "best:val/loss"'
        )
    return metrics[0]
