"""Buffers and frozen parameters of every kind: a discarded window and an evaluation leave no trace in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from trainloop.step.frozen import FrozenKeeper

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .workers import buffers

WORKER = REPOSITORY / "tests" / "workers" / "buffers.py"


@pytest.fixture(scope="module", params=["single", "ddp3", "fsdp3"])
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """All kinds in one launch: the form, and for each rank the ends by kind and name of the run."""
    out = tmp_path_factory.mktemp(request.param)
    launch(WORKER, request.param, str(out))
    return request.param, [
        json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES[request.param])
    ]


@pytest.mark.parametrize("kind", buffers.KINDS)
@pytest.mark.parametrize("run", ["bad", "evaluated"])
def test_a_model_with_such_buffers_trains_on_as_if_nothing_had_happened(
    ends: tuple[str, list[dict[str, Any]]], kind: str, run: str
) -> None:
    """Bad windows at the first step and in the middle, or two evaluations: every bit is that of a run without them."""
    form, results = ends
    if kind == "Fp8" and form == "ddp3":
        pytest.skip("DDP shares buffers over gloo, which knows no fp8")
    for own in results:
        assert ":" not in own[f"{kind} plain"], own[f"{kind} plain"]
        assert own[f"{kind} {run}"] == own[f"{kind} plain"]


def test_as_many_frozen_parameters_of_other_shapes_are_kept_later() -> None:
    """Through the first window the smallest one; after it the largest one, which `forward` has changed."""
    model = nn.Module()
    model.trained = nn.Parameter(torch.zeros(2))
    model.small = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.codebook = nn.Parameter(torch.zeros(5), requires_grad=False)
    keeper = FrozenKeeper(model)
    keeper._first_bytes = model.small.nbytes
    for window in range(3):
        keeper.remember()
        with torch.no_grad():
            model.codebook.add_(1)
        if window == 2:
            keeper.restore()
    assert model.codebook.tolist() == [2.0] * 5
