"""Compares the steps that a resumed run repeats with their records in the ledger."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .ledger import LedgerLife, StepBits

QUANTITIES = ("position in the data", "learning rates", "loss", "gradient norm")
"""The compared quantities. If several differ in a step, the first one is reported: it is closest to the cause."""
_SEVERAL_RANKS = 3  # ranks that are named
_WIDTH = 60  # characters of a value that has changed


@dataclass(frozen=True, order=True)
class Difference:
    """A quantity of a step that differs from its record."""

    step: int
    order: int
    """Index of the quantity in `QUANTITIES`."""
    rank: int
    was: float = field(compare=False)
    now: float = field(compare=False)

    @property
    def quantity(self) -> str:
        """Name of the quantity."""
        return QUANTITIES[self.order]


@dataclass
class Expected:
    """The ledger's records of the steps that are repeated."""

    steps: dict[int, StepBits] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    world_sizes: dict[int, int] = field(default_factory=dict)
    """Number of processes in the life that did the step."""

    @classmethod
    def of(cls, lives: Iterable[LedgerLife], start_step: int) -> Expected:
        """The records of a run's lives for the steps after `start_step`. Later lives win. If two of them differ, the
        rest of the older one is left out, because the run has diverged from it.
        """
        expected = cls()
        for life in lives:
            steps = {step: bits for step, bits in life.steps.items() if step > start_step}
            both = [step for step in steps if step in expected.steps]
            if any(_steps_differ(expected.steps[step], steps[step]) is not None for step in both):
                expected._forget_after(min(steps))
            expected.steps |= steps
            expected.losses |= {step: loss for step, loss in life.losses.items() if step > start_step}
            expected.world_sizes |= dict.fromkeys(steps, life.world_size)
        return expected

    def _forget_after(self, step: int) -> None:
        for table in (self.steps, self.losses, self.world_sizes):
            for other in [other for other in table if other >= step]:
                del table[other]


class Audit:
    """The comparison on one rank.

    Args:
        expected: From the ledger of this rank.
        rank: This rank.
        world_size: Number of processes in this life.
    """

    def __init__(self, expected: Expected, rank: int, world_size: int) -> None:
        self._expected, self._rank, self._world_size = expected, rank, world_size
        self.last_step = max(expected.steps, default=0)
        self.last_loss = max((step for step in expected.losses if step <= self.last_step), default=0)
        self.compared: list[int] = []
        self.differences: list[Difference] = []
        self.other_world_size = 0
        """Number of processes in the earlier life, if it differs from now. 0: it is the same."""
        self.largest_deviation = 0.0
        """Largest relative deviation of the gradient norm. At another number of processes its bits may differ."""

    def step(self, step: int, bits: StepBits) -> None:
        """Compare a step that has just been done."""
        was = self._expected.steps.pop(step, None)
        if was is None:
            return
        self.compared.append(step)
        world_size = self._expected.world_sizes.get(step, self._world_size)
        if world_size != self._world_size:
            self.other_world_size = world_size
            self.largest_deviation = max(self.largest_deviation, _deviation(was.norm, bits.norm))
            was = was._replace(norm=bits.norm)
        if (order := _steps_differ(was, bits)) is not None:
            then, now = ((float(b.position), float(b.rates), 0.0, b.norm)[order] for b in (was, bits))
            self.differences.append(Difference(step, order, self._rank, then, now))

    def loss(self, step: int, loss: float) -> None:
        """Compare a loss that has just been read."""
        was = self._expected.losses.pop(step, None)
        if was is None or self._expected.world_sizes.get(step, self._world_size) != self._world_size:
            return  # with another number of ranks, this rank's samples are different
        if not same_bits(was, loss):
            self.differences.append(Difference(step, QUANTITIES.index("loss"), self._rank, was, loss))

    def result(self) -> Result:
        """The result on this rank so far."""
        first = min((difference.step for difference in self.differences), default=0)
        return Result(
            first=min(self.compared, default=0),
            last=max(self.compared, default=0),
            differences=[difference for difference in self.differences if difference.step == first],
            other_world_size=self.other_world_size,
            world_size=self._world_size,
            deviation=self.largest_deviation,
        )


@dataclass(frozen=True)
class Result:
    """The result of the comparison."""

    first: int
    last: int
    """First and last step that were compared. 0: none."""
    differences: Sequence[Difference]
    """The differences in the first step that differs."""
    other_world_size: int
    world_size: int
    deviation: float

    @classmethod
    def joined(cls, results: Sequence[Result]) -> Result:
        """The result of all ranks together."""
        with_steps = [result for result in results if result.last]
        found = [difference for result in results for difference in result.differences]
        first = min((difference.step for difference in found), default=0)
        return cls(
            first=min((result.first for result in with_steps), default=0),
            last=max((result.last for result in with_steps), default=0),
            differences=sorted(difference for difference in found if difference.step == first),
            other_world_size=max(result.other_world_size for result in results),
            world_size=results[0].world_size,
            deviation=max(result.deviation for result in results),
        )

    @property
    def difference(self) -> Difference | None:
        """The difference that is reported."""
        return min(self.differences, default=None)

    @property
    def is_of_other_samples(self) -> bool:
        """Whether the global batch has changed with the number of processes, so that nothing can be compared."""
        return bool(self.other_world_size and self.difference is not None and self.difference.order == 0)

    def text(self, changes: Mapping[str, tuple[object, object]]) -> str:
        """The text for the log.

        Args:
            changes: Other differences between this life and the last one: settings, versions, hosts.
        """
        steps = f"Steps {self.first} to {self.last} were" if self.last > self.first else f"Step {self.first} was"
        others = self.other_world_size
        at = f" by {self.world_size} processes instead of {others}" if others else ""
        found = self.difference
        if found is None and not others:
            return f"{steps} repeated with the same bits."
        if found is None:
            return (
                f"{steps} repeated{at}: same positions in the data, same learning rates, and gradient norms that differ"
                f" by at most {self.deviation:.1e}. They may differ, because the sums are taken in another order."
            )
        if self.is_of_other_samples:
            return f"{steps} repeated{at} with other global batches, so they cannot be compared."
        where = ranks_text([d.rank for d in self.differences if d.order == found.order])
        values = f": {found.now!r} instead of {found.was!r}" if found.order > 1 else ""
        before = f"{steps} repeated{at}, but not with the same bits. "
        known = ", ".join(f"{name} ({_shown(was)} → {_shown(now)})" for name, (was, now) in changes.items())
        known = f" Also changed since then: {known}." if known else ""
        return (
            f"{before}The first difference is in step {found.step}, {where}: the {found.quantity}{values}."
            f" {self._meaning(found)}{known}"
        )

    def _meaning(self, found: Difference) -> str:
        if found.quantity == "position in the data":
            return "The run reads other samples than before. Look for a change in the data's length, order or batches."
        if found.quantity == "learning rates":
            return "Look for a change in the learning rate or in its schedule."
        num_ranks = len({d.rank for d in self.differences if d.order == found.order})
        if found.quantity == "loss" and num_ranks < self.world_size:
            return (
                "The other ranks have the same loss as before, so look at this one. Possible causes: a changed sample,"
                " another host, a faulty device, or a kernel that is not deterministic."
            )
        return (
            "The position in the data and the learning rates are the same. Possible causes: a changed sample, a kernel"
            " that is not deterministic (see `deterministic=True`), another machine, other versions, or a faulty"
            " device."
        )


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def ranks_text(ranks: Sequence[int]) -> str:
    """For example "ranks 0, 1, 2, …"."""
    distinct = sorted(set(ranks))
    more = ", …" if len(distinct) > _SEVERAL_RANKS else ""
    return f"rank{'s' if len(distinct) > 1 else ''} {', '.join(map(str, distinct[:_SEVERAL_RANKS]))}{more}"


def same_bits(a: float, b: float) -> bool:
    """Whether two numbers are bit-for-bit equal. A NaN equals any other NaN."""
    return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))


def _steps_differ(was: StepBits, now: StepBits) -> int | None:
    """Index in `QUANTITIES` of the first quantity that differs. None: no difference."""
    if was.position != now.position:
        return 0
    if was.rates != now.rates:
        return 1
    return None if same_bits(was.norm, now.norm) else QUANTITIES.index("gradient norm")


def _deviation(was: float, now: float) -> float:
    if same_bits(was, now):
        return 0.0
    scale = max(abs(was), abs(now))
    return abs(was - now) / scale if math.isfinite(scale) and scale > 0 else math.inf
