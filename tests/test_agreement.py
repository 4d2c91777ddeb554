"""Ranks that come to differ are told within one step, with the quantity and the parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .workers.agreement import SCENARIOS, STEPS

WORKER = REPOSITORY / "tests" / "workers" / "agreement.py"
EXPECTED = {
    # name: the step that ends, what the error says
    "bypass": (
        2,
        "the gradient norm (rank 0: ",
        "Weights differ from rank 0's in 4 parameters: inner.weight, inner.bias, head.weight, head.bias (rank",
        "Look for a part of the model that `forward` does not call through `self.model`",
    ),
    "rate": (3, "the learning rates (rank", ": [0.01]", "rank 1: [0.5]"),
    "data": (3, "the data position (rank", "Look for data"),
    "last": (STEPS, "the learning rates (rank"),
    "scale": (2, "loss scale (rank 0: 16.0; rank", ": 8.0)"),
}


def run(form: str, out: Path, *names: str) -> dict[str, list[Any]]:
    """By scenario what each rank was told."""
    launch(WORKER, form, str(out), *names)
    ranks = range(NUM_PROCESSES[form])
    return {name: [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in ranks] for name in names}


TOLD = {
    # name: what every rank is told before a wrong update
    "unfreeze": "ValueError: `requires_grad` of 2 parameters (inner.weight, inner.bias) was set after the model was",
    "in forward": "ValueError: `forward` has computed gradients itself: 4 parameters (inner.weight, inner.bias, head",
    "unused": "ValueError: 2 parameters (unused.weight, unused.bias) got no gradient in this step, but DDP waits",
}
NUM_STEPS_BEFORE = {"unfreeze": 2, "in forward": 0, "unused": 0}


@pytest.fixture(scope="module", params=["single", "ddp3", "fsdp2"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, list[Any]]]:
    """Every scenario in one launch of the form. The last one ends the process of one rank."""
    form: str = request.param
    left_out = {"single": {*EXPECTED, "unused", "unused on one"}, "fsdp2": {"bypass", "unused", "unused on one"}}
    names = [name for name in SCENARIOS if name not in left_out.get(form, ())]
    return form, run(form, tmp_path_factory.mktemp(form), *names)


def test_ranks_that_differ_are_told_within_one_step(results: Any) -> None:
    """The same error on every rank: the step, the quantity with its values by rank, the parameters, where to look. A
    run whose ranks agree is left alone.
    """
    _, by_name = results
    for name in ("none", "ignored"):  # a parameter that DDP is told to ignore needs no gradient
        assert {(r["error"], r["step"]) for r in by_name[name]} == {(None, STEPS)}
    for name in EXPECTED.keys() & by_name.keys():
        step, *texts = EXPECTED[name]
        errors = {result["error"] for result in by_name[name]}
        assert len(errors) == 1, name
        error = errors.pop()
        assert error.startswith(f"RankDisagreementError: Step {step}: the ranks do not agree on the "), (name, error)
        assert all(str(text) in error for text in texts), (name, error)


def test_a_wrong_gradient_is_told_before_it_is_applied(results: Any) -> None:
    """A frozen parameter that is set free in mid-run, `backward` called in `forward`, a parameter without a gradient
    under DDP: an error on every rank that names the parameters and the remedy.
    """
    _, by_name = results
    for name in TOLD.keys() & by_name.keys():
        for result in by_name[name]:
            assert result["error"].startswith(TOLD[name]), (name, result)
            assert len(result["norms"]) == NUM_STEPS_BEFORE[name]


def test_an_unused_parameter_of_one_rank_is_told_by_that_rank(results: Any) -> None:
    """The others are told which rank ended, and with what."""
    form, by_name = results
    if form == "ddp3":
        errors = [result["error"] for result in by_name["unused on one"]]
        assert errors[1].startswith(TOLD["unused"])
        assert all("Rank 1 (process" in errors[i] and "got no gradient in this step" in errors[i] for i in (0, 2)), (
            errors
        )


def test_accumulation_may_change_between_two_steps(results: Any) -> None:
    """A hook sets `gradient_accumulation_steps` from 1 to 4: the mean over the window stays a mean, on any number of
    ranks. All samples are equal and nothing is learned, so the norm stays what it is.
    """
    _, by_name = results
    for result in by_name["accumulate"]:
        assert result["error"] is None
        assert len(result["norms"]) == STEPS
        assert result["norms"] == pytest.approx([result["norms"][0]] * STEPS, rel=1e-5)


def test_a_part_in_eval_mode_stays_so(results: Any) -> None:
    """Its running statistics don't move, below a model in training mode. A model that comes whole in eval mode
    trains.
    """
    _, by_name = results
    for name, is_moved in {"backbone": False, "whole": True, "none": True}.items():
        for result in by_name[name]:
            assert (result["error"], result["moved"], result["trains"]) == (None, is_moved, True), name


def test_methods_other_than_forward_train_the_same(results: Any) -> None:
    """`self.model.decode(self.model.encode(x))`, both named in `forward_methods`, gives the gradients of the call of
    the model that does the same.
    """
    _, by_name = results
    for result, whole in zip(by_name["methods"], by_name["none"], strict=True):
        assert result["error"] is None
        assert result["norms"] == pytest.approx(whole["norms"], rel=1e-5)
