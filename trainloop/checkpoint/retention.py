"""Decides which checkpoints are kept. Pure functions over their manifests."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from ..errors import check_int, describe
from .format.layout import ManifestInfo


@runtime_checkable
class RetentionPolicy(Protocol):
    """Chooses checkpoints to keep: any object with this method. A checkpoint is kept if any policy chooses it.

    The policy is asked after every commit, about the remaining checkpoints. So its answer must not depend on
    checkpoints that it did not keep.
    """

    def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
        """Choose checkpoints.

        Args:
            manifests: Of the existing checkpoints, from the oldest commit to the newest, each of another step.

        Returns:
            The steps to keep.
        """


@dataclass(frozen=True)
class KeepPrevious:
    """Keeps the newest checkpoint and the `num` before it."""

    num: int

    def __post_init__(self) -> None:
        check_int("num", self.num, 0)

    def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
        return {manifest.step for manifest in manifests[-1 - self.num :]}


@dataclass(frozen=True)
class KeepInterval:
    """Keeps checkpoints whose step is divisible by `interval`."""

    interval: int

    def __post_init__(self) -> None:
        check_int("interval", self.interval, 1)

    def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
        return {manifest.step for manifest in manifests if manifest.step % self.interval == 0}


@dataclass(frozen=True, init=False)
class KeepSteps:
    """Keeps the checkpoints of certain steps."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        steps = list(steps)
        for i, step in enumerate(steps):
            check_int(f"steps[{i}]", step, 0)
        object.__setattr__(self, "steps", frozenset(steps))

    def __repr__(self) -> str:
        return f"KeepSteps({sorted(self.steps)})"

    def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
        return {manifest.step for manifest in manifests if manifest.step in self.steps}


@dataclass(frozen=True)
class BestK:
    """Keeps the `k` checkpoints with the best value of a metric; of equal ones, the earlier. A checkpoint without the
    metric, or with NaN, is not chosen. If no checkpoint has the metric, all are kept, because its name may be wrong.
    """

    metric: str
    """Name of the logged metric, with nested keys joined: "val/loss"."""
    k: int = 1
    mode: Literal["min", "max"] = field(default="min", kw_only=True)
    """Whether the lowest ("min") or the highest ("max") value is best."""

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise TypeError(f"`metric` must be a string, but is {describe(self.metric)}.")
        check_int("k", self.k, 1)
        if self.mode not in ("min", "max"):
            raise ValueError(f'`mode` must be "min" or "max", but is {self.mode!r}.')

    def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
        if not any(self.metric in manifest.metrics for manifest in manifests):
            return {manifest.step for manifest in manifests}
        sign = 1 if self.mode == "min" else -1
        ranked = [m for m in manifests if not math.isnan(m.metrics.get(self.metric, math.nan))]
        ranked.sort(key=lambda manifest: (sign * manifest.metrics[self.metric], manifest.seq))
        return {manifest.step for manifest in ranked[: self.k]}


@dataclass(frozen=True)
class EverySeconds:
    """Keeps a chain of commits. Each is the first one that came at least `seconds` after the previous one in the chain.
    If the clock has gone back, the chain starts again.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"`seconds` must be greater than 0, but is {self.seconds}.")

    def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
        kept: set[int] = set()
        last = -math.inf
        for manifest in manifests:
            if manifest.time >= last + self.seconds or manifest.time < last:
                kept.add(manifest.step)
                last = manifest.time
        return kept


def policies_of(
    keep_previous: int, keep: Iterable[RetentionPolicy], keep_interval: int, keep_steps: Sequence[int]
) -> list[RetentionPolicy]:
    """The policies of a run, from the arguments of `CheckpointingHook`."""
    policies: list[RetentionPolicy] = [KeepPrevious(keep_previous), *keep]
    if keep_interval:
        policies.append(KeepInterval(keep_interval))
    return [*policies, KeepSteps(keep_steps)] if keep_steps else policies


OwnPolicy: TypeAlias = "KeepPrevious | KeepInterval | KeepSteps | BestK | EverySeconds"

_OWN: tuple[type[OwnPolicy], ...] = (KeepPrevious, KeepInterval, KeepSteps, BestK, EverySeconds)


def describe_policies(policies: Iterable[RetentionPolicy]) -> list[dict[str, Any]]:
    """Policies in the form of a manifest. Ours have their name and fields, `{"policy": "KeepPrevious", "num": 2}`. A
    user's own policy has only its name, `{"custom": "KeepMondays"}`.
    """
    described = []
    for policy in policies:
        if isinstance(policy, _OWN) and type(policy) in _OWN:
            values = {item.name: getattr(policy, item.name) for item in fields(policy)}
            values = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in values.items()}
            described.append({"policy": type(policy).__name__, **values})
        else:
            described.append({"custom": type(policy).__qualname__})
    return described


def read_policies(described: Iterable[Mapping[str, Any]]) -> tuple[list[RetentionPolicy], list[str]]:
    """The inverse of `describe_policies`, as far as possible.

    Returns:
        The policies, and the names of those that are unknown here: the user's own, or a later trainloop's.
    """
    own = {kind.__name__: kind for kind in _OWN}
    policies: list[RetentionPolicy] = []
    unknown = []
    for entry in described:
        values = dict(entry)
        name = values.pop("policy", None)
        try:
            policies.append(own[name](**values))
        except (KeyError, TypeError, ValueError):
            unknown.append(str(name or values.get("custom")))
    return policies, unknown


def reasons_to_keep(
    manifests: Sequence[ManifestInfo], policies: Iterable[RetentionPolicy], protected_steps: Collection[int] = ()
) -> dict[int, list[str]]:
    """The reasons to keep each checkpoint. An empty list: it is not kept.

    Args:
        manifests: Of all valid checkpoints, each of another step, in any order.
        policies: The user's policies.
        protected_steps: Steps that must stay, for example the one that the run was resumed from.

    Returns:
        By step, in the order of the commits. With any policies, the newest and the newest healthy one are kept.
    """
    manifests = sorted(manifests, key=lambda manifest: manifest.seq)
    reasons: dict[int, list[str]] = {manifest.step: [] for manifest in manifests}

    def keep(steps: Collection[int], reason: str) -> None:
        for step in reasons.keys() & steps:
            reasons[step].append(reason)

    keep({manifest.step for manifest in manifests[-1:]}, "newest")
    keep({manifest.step for manifest in [m for m in manifests if m.health][-1:]}, "newest healthy")
    keep(protected_steps, "in use")
    for policy in policies:
        keep(policy.keep(manifests), repr(policy))
    return reasons


def to_delete(
    manifests: Sequence[ManifestInfo], policies: Iterable[RetentionPolicy], protected_steps: Collection[int] = ()
) -> list[int]:
    """Steps of the checkpoints that have no reason to be kept, from the oldest commit to the newest.

    Args:
        manifests: As for `reasons_to_keep`.
        policies: The user's policies.
        protected_steps: Steps that must stay.
    """
    return [step for step, reasons in reasons_to_keep(manifests, policies, protected_steps).items() if not reasons]
