"""A non-finite gradient never wins: all ranks see it alike, its window leaves no trace, the report is of use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .workers import non_finite

WORKER = REPOSITORY / "tests" / "workers" / "non_finite.py"
STEPS, BAD = non_finite.STEPS, non_finite.BAD_STEP
Results = list[dict[str, Any]]
"""Outcomes by name of the case, for each rank."""


@pytest.fixture(scope="module", params=["single", "ddp2", "fsdp2", pytest.param("hsdp2x2", marks=pytest.mark.slow)])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(form: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases in one launch of the form."""
    out = tmp_path_factory.mktemp(form)
    launch(WORKER, form, str(out))
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES[form])]


def steps(results: dict[str, Any], case: str) -> list[list[Any]]:
    return [event for event in results[case]["events"] if event[0] == "step"]


def cases(results: dict[str, Any]) -> list[str]:
    return [case for case in results if case.split("-")[0] in non_finite.INJECTIONS]


def test_a_discarded_window_leaves_no_trace(results: Results) -> None:
    """NaN in the batch, the loss or a gradient, Inf in one shard; on rank 0, rank 1 or both; accumulation 1 and 4;
    with and without clipping: parameters, BatchNorm's and other buffers, optimizer state and learning rates equal
    those of a run whose data never had the window, bit for bit.
    """
    for rank, own in enumerate(results):
        assert len(cases(own)) == (10 if len(results) == 1 else 30)
        for case in cases(own):
            *_, n, clip = case.split("-")
            healthy = own[f"healthy-{n}-{clip}"]
            assert own[case]["digest"] == healthy["digest"], f"{case} on rank {rank}"
            lrs = [event[3] for event in steps(own, case)]
            assert lrs == [event[3] for event in healthy["events"]], f"{case} on rank {rank}"


def test_every_rank_completes_the_window_and_counts_one_retry(results: Results) -> None:
    """Hooks hear of each discarded window once, on every rank, and it costs exactly its own micro-batches."""
    for own in results:
        for case in cases(own):
            *_, n, clip = case.split("-")
            events = [event[:3] for event in own[case]["events"]]
            wanted = [["step", step, int(step == BAD)] for step in range(1, STEPS + 1)]
            wanted.insert(BAD - 1, ["retry", BAD, 1])
            assert events == wanted, case
            assert own[case]["forwards"] == own[f"healthy-{n}-{clip}"]["forwards"] + int(n), case


def test_a_limit_of_zero_raises_at_once(results: Results) -> None:
    """`max_non_finite_grad_retries=0`: the first window that is not finite ends the run, on every rank alike."""
    errors = {own["limit-0"]["error"] for own in results}
    assert len(errors) == 1
    (error,) = errors
    assert error.startswith(f"Step {BAD}: the gradient is not finite and 0 retries are used up (retries so far: 0).")
    assert [event[:2] for event in results[0]["limit-0"]["events"]] == [["step", step] for step in range(1, BAD)]


def test_the_limit_counts_retries_of_one_step(results: Results, form: str) -> None:
    """K retries are allowed: three bad windows pass a limit of 3 and end a run with a limit of 2; the report names the
    step, the losses, the parameter, the rank and the way on.
    """
    for own in results:
        assert [event[:3] for event in own["limit-3"]["events"]][BAD - 1 : BAD + 3] == [
            ["retry", BAD, 1],
            ["retry", BAD, 2],
            ["retry", BAD, 3],
            ["step", BAD, 3],
        ]
        assert [event[2] for event in own["limit-2"]["events"] if event[0] == "retry"] == [1, 2]
        error = own["limit-2"]["error"]
        assert f"Step {BAD}: the gradient is not finite and 2 retries are used up (retries so far: 2)." in error
        last = NUM_PROCESSES[form] - 1
        assert re.search(rf"losses by rank: (.*; )?{last}: [\d.]+; every loss is finite", error), error
        # Under DDP and FSDP2 the reduction spreads the NaN; FSDP2 holds the one element on one rank of each replica.
        assert re.search(r"non-finite gradients in 1 of 7 parameters: scale \(ranks \[[\d, ]+\]\)", error), error
        assert "set_detect_anomaly" in error


def test_a_run_without_a_single_finite_gradient_ends(results: Results) -> None:
    """With the default of the limit: after a whole epoch, or 100 windows of endless data; on every rank at once, also
    where the ranks' own data have different lengths.
    """
    for data, tried, num_windows in (
        ("map", "a whole epoch", 2 * STEPS + 1),  # the rest of the first epoch, a whole one, and the next window
        ("endless", "100 windows", 100),
        ("uneven", "a whole epoch", None),
    ):
        errors = {own[f"hopeless-{data}"]["error"] for own in results}
        assert len(errors) == 1
        assert errors.pop().startswith(f"Step 1: the gradient is not finite and {tried} gave no finite one")
        counts = {own[f"hopeless-{data}"]["forwards"] for own in results}
        assert len(counts) == 1
        assert counts == {num_windows} or num_windows is None


def test_parameters_that_are_not_finite_raise_whatever_the_limit(results: Results) -> None:
    """No retry can mend them."""
    for own in results:
        error = own["parameter"]["error"]
        assert "Step 3: the gradient is not finite and the parameters themselves are non-finite" in error
        assert "out.weight" in error
        assert [event[:2] for event in own["parameter"]["events"]] == [["step", 1], ["step", 2]]


def test_a_loss_that_is_not_finite_is_no_reason_while_the_gradient_is(results: Results) -> None:
    """A NaN constant added to the loss changes no gradient: the update is sound and is taken."""
    for own in results:
        assert "error" not in own["constant"]
        assert [event[:3] for event in own["constant"]["events"]] == [["step", s, 0] for s in range(1, STEPS + 1)]


def test_a_norm_that_overflows_is_no_non_finite_gradient(results: Results) -> None:
    """Every gradient is finite and only the sum of their squares is not: the step is clipped and taken, not retried."""
    for own in results:
        for case in ("huge-None", "huge-0.5"):
            assert [event[:3] for event in own[case]["events"]] == [["step", s, 0] for s in range(1, BAD + 1)]
            assert 1e20 < own[case]["grad_norm"] < float("inf")
        assert all(abs(w) < 10 for row in own["huge-0.5"]["weight"] for w in row)
    log = results[0]["huge-0.5"]["log"]
    assert len(log) == 1
    assert "the gradient norm overflowed" in log[0]
    assert "The gradient is clipped and applied." in log[0]


def test_an_overflow_under_a_scaler_lowers_the_scale_and_is_not_counted(results: Results) -> None:
    """The learning rate doesn't move, the step is still one update, and no retry is used up."""
    for own in results:
        assert "error" not in own["scaler"]
        assert [event[:3] for event in own["scaler"]["events"]] == [["step", s, 0] for s in range(1, STEPS + 1)]
        assert any("Trying again with loss scale" in line for line in results[0]["scaler"]["log"])


def test_a_loss_scale_that_collapses_raises(results: Results) -> None:
    """A gradient that no scale makes finite ends the run instead of lowering the scale for ever."""
    for own in results:
        assert "the loss scale collapsed to" in own["scaler-collapse"]["error"]


@pytest.mark.parametrize("form", ["ddp2", "fsdp2"])
def test_it_holds_in_bf16(form: str, tmp_path: Path) -> None:
    """Mixed precision from the launch: the discarded window leaves no trace either, and BatchNorm stays in fp32."""
    launch(WORKER, form, str(tmp_path), "batch", "shard", launch_args=["--mixed_precision", "bf16"])
    for rank in range(2):
        own = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(cases(own)) == 18
        for case in cases(own):
            *_, n, clip = case.split("-")
            assert own[case]["digest"] == own[f"healthy-{n}-{clip}"]["digest"], f"{case} on rank {rank}"
            assert [event[2] for event in steps(own, case)] == [0, 0, 1, 0, 0]
