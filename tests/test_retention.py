"""Retention: what the policies want stays, and never are the newest or the newest healthy checkpoint removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainloop.checkpoint import (
    BestK,
    EverySeconds,
    KeepInterval,
    KeepPrevious,
    KeepSteps,
    ManifestInfo,
    RetentionPolicy,
    reasons_to_keep,
    to_delete,
)


def info(step: int, seq: int | None = None, *, health: bool = True, time: float | None = None, **metrics: float) -> Any:
    """What a manifest says, as far as retention asks."""
    seq = step if seq is None else seq
    return ManifestInfo(step, seq, "run", float(seq) if time is None else time, 1, health, metrics, 0)


def kept(policy: RetentionPolicy, manifests: Sequence[ManifestInfo]) -> list[int]:
    return sorted(policy.keep(manifests))


# ---------------------------------------------------------------------- each policy


def test_keep_previous_counts_commits_before_the_newest() -> None:
    """`KeepPrevious(n)` keeps the newest and n before it, by commit: after a roll-back low steps are new."""
    manifests = [info(10, 1), info(20, 2), info(30, 3), info(15, 4)]
    assert kept(KeepPrevious(0), manifests) == [15]
    assert kept(KeepPrevious(2), manifests) == [15, 20, 30]
    assert kept(KeepPrevious(9), manifests) == [10, 15, 20, 30]


def test_keep_interval_and_steps_look_at_the_step() -> None:
    """Steps divisible by the interval and steps of the list stay, whenever they were committed."""
    manifests = [info(step) for step in (0, 5, 10, 15, 20)]
    assert kept(KeepInterval(10), manifests) == [0, 10, 20]
    assert kept(KeepSteps([5, 20, 99]), manifests) == [5, 20]


def test_best_k_ranks_by_the_metric_and_passes_over_nan() -> None:
    """The k smallest (or largest) values stay; NaN and a missing metric are never best, of equal ones the first is."""
    values = [(1, 0.5), (2, 0.1), (3, math.nan), (4, 0.1), (5, -math.inf)]
    manifests = [info(step, loss=value) for step, value in values] + [info(6)]
    assert kept(BestK("loss", 1), manifests) == [5]
    assert kept(BestK("loss", 2), manifests) == [2, 5]
    assert kept(BestK("loss", 2, mode="max"), manifests) == [1, 2]
    assert kept(BestK("accuracy", 3), manifests) == [1, 2, 3, 4, 5, 6]  # none has it: nothing is deleted on its account


def test_every_seconds_keeps_a_chain() -> None:
    """Neighbours of the chain are at least so far apart, and the chain does not move when the others are gone."""
    manifests = [info(step, time=time) for step, time in [(1, 0), (2, 50), (3, 100), (4, 130), (5, 199), (6, 205)]]
    assert kept(EverySeconds(100), manifests) == [1, 3, 6]
    assert kept(EverySeconds(100), [m for m in manifests if m.step in (1, 3, 6)]) == [1, 3, 6]


def test_every_seconds_goes_on_where_the_clock_goes_back() -> None:
    """After the clock went back by an hour, commits are kept at the same distances as before."""
    times = [0, 50, 100, 150, -3500, -3450, -3400, -3350, -3300]
    manifests = [info(step, time=time) for step, time in enumerate(times, 1)]
    assert kept(EverySeconds(100), manifests) == [1, 3, 5, 7, 9]
    assert kept(EverySeconds(100), [m for m in manifests if m.step in (1, 3, 5, 7, 9)]) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeepPrevious(-1), "`num` must be at least 0, but is -1."),
        (lambda: KeepInterval(0), "`interval` must be at least 1, but is 0."),
        (lambda: KeepSteps([3, -2]), "`steps[1]` must be at least 0, but is -2."),
        (lambda: BestK("loss", 0), "`k` must be at least 1, but is 0."),
        (lambda: BestK("loss", mode="least"), '`mode` must be "min" or "max", but is \'least\'.'),  # type: ignore[arg-type]
        (lambda: EverySeconds(0), "`seconds` must be greater than 0, but is 0."),
        (lambda: EverySeconds(math.nan), "`seconds` must be greater than 0, but is nan."),
    ],
)
def test_values_that_cannot_be_meant_are_refused(make: Any, message: str) -> None:
    """A policy says at construction what is wrong with its argument."""
    with pytest.raises(ValueError, match="must be") as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [1.5, True, "3", None])
def test_whole_numbers_are_whole_numbers(value: Any) -> None:
    """A number of checkpoints that is not an int is a TypeError that shows it."""
    with pytest.raises(TypeError, match=r"`num` must be an integer, but is .*\("):
        KeepPrevious(value)


# ---------------------------------------------------------------------- all together


def test_reasons_name_every_rule() -> None:
    """For each checkpoint the rules that keep it are told, in the order of the commits."""
    manifests = [info(20, 2, health=False), info(10, 1), info(5, 0)]
    assert reasons_to_keep(manifests, [KeepInterval(10)], protected_steps={5}) == {
        5: ["in use"],
        10: ["newest healthy", "KeepInterval(interval=10)"],
        20: ["newest", "KeepInterval(interval=10)"],
    }


def test_a_policy_of_ones_own_is_any_object_with_keep() -> None:
    """What fits the protocol is a policy; steps that do not exist do no harm."""

    class Odd:
        def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
            return {manifest.step for manifest in manifests if manifest.step % 2} | {99}

    assert isinstance(Odd(), RetentionPolicy)
    assert to_delete([info(step) for step in range(1, 6)], [Odd()]) == [2, 4]


POLICIES = st.one_of(
    st.builds(KeepPrevious, st.integers(0, 4)),
    st.builds(KeepInterval, st.integers(1, 6)),
    st.builds(KeepSteps, st.lists(st.integers(0, 30), max_size=4)),
    st.builds(BestK, st.sampled_from(["loss", "accuracy"]), st.integers(1, 3), mode=st.sampled_from(["min", "max"])),
    st.builds(EverySeconds, st.floats(0.5, 20)),
)
COMMITS = st.lists(
    st.tuples(
        st.integers(-6, 4),  # how far the run goes back (a restart, a roll-back) or on before the commit
        st.booleans(),
        st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats()),
        st.floats(-3, 10),  # seconds since the commit before; clocks go back
    ),
    max_size=25,
)


def history(commits: list[Any]) -> list[ManifestInfo]:
    """The manifests that a run with restarts and roll-backs commits, one after the other."""
    manifests, step, time = [], 0, 1e9
    for seq, (progress, health, metrics, seconds) in enumerate(commits, 1):
        step, time = max(step + progress, 0), time + seconds
        manifests.append(ManifestInfo(step, seq, "run", time, 1, health, metrics, 0))
    return manifests


@given(COMMITS, st.lists(POLICIES, max_size=3))
def test_nothing_that_anybody_wants_is_ever_deleted(commits: list[Any], policies: list[RetentionPolicy]) -> None:
    """After each commit of any history the disk holds what each policy wants, the newest and the newest healthy one,
    and nothing else.
    """
    disk: dict[int, ManifestInfo] = {}
    for manifest in history(commits):
        disk[manifest.step] = manifest  # the same step again replaces
        before = sorted(disk.values(), key=lambda m: m.seq)
        for step in to_delete(list(disk.values()), policies):
            del disk[step]
        assert manifest.step in disk
        healthy = [m.step for m in before if m.health]
        assert not healthy or healthy[-1] in disk
        wanted = set().union(*(policy.keep(before) for policy in policies)) if policies else set()
        assert wanted <= disk.keys()
        assert disk.keys() <= wanted | {manifest.step, *healthy[-1:]}


@given(COMMITS, st.lists(POLICIES, max_size=3))
def test_asking_again_deletes_nothing_more(commits: list[Any], policies: list[RetentionPolicy]) -> None:
    """What was left once is left when the same policies look at it again, as after a restart."""
    disk = {m.step: m for m in history(commits)}
    for step in to_delete(list(disk.values()), policies):
        del disk[step]
    assert to_delete(list(disk.values()), policies) == []


@given(COMMITS, st.integers(1, 4), st.sampled_from(["min", "max"]))
def test_the_best_of_all_times_stay(commits: list[Any], k: int, mode: Any) -> None:
    """Deleting after each commit loses none of the k best of the whole history, where no step was replaced."""
    manifests = [replace(m, step=m.seq) for m in history(commits)]
    policy = BestK("loss", k, mode=mode)
    disk: dict[int, ManifestInfo] = {}
    for manifest in manifests:
        disk[manifest.step] = manifest
        for step in to_delete(list(disk.values()), [policy]):
            del disk[step]
    assert policy.keep(manifests) <= disk.keys()


@given(COMMITS, st.lists(POLICIES, max_size=2), st.sets(st.integers(0, 20)))
def test_protected_steps_stay(commits: list[Any], policies: list[RetentionPolicy], steps: set[int]) -> None:
    """What the caller protects stays, whatever the policies want."""
    assert not steps & set(to_delete(list({m.step: m for m in history(commits)}.values()), policies, steps))
