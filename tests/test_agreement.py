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
    "unfreeze": (4, "the gradient norm (rank 0: ", "Gradients differ from rank 0's in 2 parameters: inner.weight,"),
    "rate": (3, "the learning rates (rank", ": [0.01]", "rank 1: [0.5]"),
    "data": (3, "the data position (rank", "Look for data"),
    "last": (STEPS, "the learning rates (rank"),
    "scale": (2, "loss scale (rank 0: 16.0; rank", ": 8.0)"),
}
SILENT_UNDER_FSDP2 = {"bypass", "unfreeze"}  # its hooks are on the modules themselves, which nothing bypasses here


def run(form: str, out: Path, *names: str) -> dict[str, list[Any]]:
    """By scenario what each rank was told."""
    launch(WORKER, form, str(out), *names)
    ranks = range(NUM_PROCESSES[form])
    return {name: [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in ranks] for name in names}


@pytest.mark.parametrize("form", ["ddp3", "fsdp2"])
def test_ranks_that_differ_are_told_within_one_step(tmp_path: Path, form: str) -> None:
    """The same error on every rank: the step, the quantity with its values by rank, the parameters, where to look. A
    run whose ranks agree is left alone.
    """
    names = [name for name in SCENARIOS if form != "fsdp2" or name not in SILENT_UNDER_FSDP2]
    results = run(form, tmp_path, *names)
    assert results.pop("none") == [{"error": None, "step": STEPS}] * NUM_PROCESSES[form]
    for name, by_rank in results.items():
        step, *texts = EXPECTED[name]
        errors = {result["error"] for result in by_rank}
        assert len(errors) == 1, name
        error = errors.pop()
        assert error.startswith(f"RankDisagreementError: Step {step}: the ranks do not agree on the "), (name, error)
        assert all(str(text) in error for text in texts), (name, error)
