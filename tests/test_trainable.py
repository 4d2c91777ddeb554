"""Freezing and unfreezing between two steps, against a plain loop that does it by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import BaseHook
from trainloop.checkpoint import Checkpoint

from .launching import REPOSITORY, launch, written_by_ranks
from .small import SmallTrainer
from .workers.trainable import PLAN, STEPS, Schedule, Trainer, digest, plain, resumed, run

WORKER = REPOSITORY / "tests" / "workers" / "trainable.py"


@pytest.fixture(scope="module", params=["single", "ddp2", "fsdp2"])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a launch, and what each rank has written."""
    out: Path = tmp_path_factory.mktemp(request.param)
    return out, written_by_ranks(request.param, out, WORKER, run, timeout=120)


def check_against_plain(rows: Any, found: dict[str, Any], first_step: int = 1, **tolerance: float) -> None:
    """Losses and norms of each step, and weights and averages at the end."""
    expected, weights, averages = plain()
    assert [row for one in rows for row in one] == pytest.approx(
        [row for one in expected[first_step - 1 :] for row in one], rel=1e-5
    )
    for kind, tensors in (("model", weights), ("ema", averages)):
        for name, tensor in tensors.items():
            assert found[f"{kind}/{name}"] == pytest.approx(tensor.flatten().tolist(), **tolerance), (kind, name)


def test_a_run_that_freezes_and_unfreezes_is_that_of_a_plain_loop(launched: tuple[Path, list[Any]]) -> None:
    """Losses and norms at every step, weights and averages, whether it is done before a step or after the one before.
    A single process has the same bits.
    """
    tolerance = {"rel": 0.0, "abs": 0.0} if len(launched[1]) == 1 else {"rel": 1e-4, "abs": 1e-6}
    for results in launched[1]:
        check_against_plain(*results["whole"], **tolerance)
        assert results["before"] == results["whole"]


def test_fsdp2_knows_the_dtype_of_what_was_frozen_at_first(launched: tuple[Path, list[Any]]) -> None:
    """It looks when a unit runs for the first time. In mixed precision it would reduce and hand out bf16 else."""
    for results in launched[1]:
        assert results["dtypes"] == (["torch.float32"] * 2 if "fsdp2" in launched[0].name else [])


def test_a_resume_trains_what_the_run_trained(launched: tuple[Path, list[Any]]) -> None:
    """Bit for bit, from checkpoints that leave out what is frozen and was never trained."""
    out, by_rank = launched
    for results in by_rank:
        for step in (4, 6, 8):
            assert results[f"from {step}"] == results["whole"], step
    for step, names in ((2, {"body.0.weight", "body.0.bias"}), (4, set())):  # what is trained next is written
        manifest = Checkpoint.open(out / "whole" / "checkpoints" / f"step_{step:07d}").manifest
        assert manifest.frozen.keys() == names


def test_changes_that_differ_between_the_ranks_are_told(launched: tuple[Path, list[Any]]) -> None:
    """On every rank, before the window: of different patterns, and of a rank that changes something by itself."""
    text = "Step 3: `phases` and calls of `set_trainable` must be the same on every rank, at the same step, but are not"
    told = f"{text} (rank 0: set_trainable('head.*'); rank 1: set_trainable('*'))."
    alone = f"{text} (rank 1: set_trainable('*'); rank 0: goes on as before)."
    for rank, results in enumerate(launched[1] if len(launched[1]) > 1 else []):
        different, one = results["errors"]
        assert different == ["RankDisagreementError", told, 2]
        assert alone in one[1]
        assert one[0] == ("RankDisagreementError" if rank == 1 else "TrainingError")


def test_one_process_goes_on_with_it(launched: tuple[Path, list[Any]]) -> None:
    """From the checkpoints of any form."""
    trainer = resumed(launched[0], 4, "one process")
    check_against_plain(trainer.recorder.rows, digest(trainer), 5, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ddp3", "fsdp3"])
def test_three_processes_go_on_with_it(form: str, launched: tuple[Path, list[Any]]) -> None:
    out = launched[0]
    launch(WORKER, form, str(out), "elsewhere")
    for rank in range(3):
        found = json.loads((out / f"elsewhere{rank}.json").read_text())
        check_against_plain(found["rows"], found["digest"], 5, rel=1e-4, abs=1e-6)


def test_a_loaded_state_brings_back_what_it_trained() -> None:
    """Also one from before the first change, where `build_model` had decided."""
    states: dict[int, Any] = {}

    class Keep(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            states[trainer.step] = trainer.state_dict()

    def trained(trainer: Any) -> set[str]:
        return {name for name, param in trainer.named_parameters().items() if param.requires_grad}

    trainer = Trainer(None, Schedule(is_before=True), Keep(), max_steps=3)
    trainer.train()
    assert trained(trainer) == {"head.weight", "head.bias", "body.2.weight", "body.2.bias"}
    trainer.load_state_dict(states[1])
    assert trained(trainer) == {"head.weight", "head.bias"}
    other = Trainer(None, max_steps=1)
    other.train()
    initial = other.state_dict()
    other.set_trainable("head.*")
    other.load_state_dict(initial)
    assert trained(other) == trainer.named_parameters().keys() - {"head.bias"}
    assert initial["training_state"]["trainable"] is None
    assert set(PLAN) <= set(range(1, STEPS))


class Calls(BaseHook):
    """Calls `set_trainable` at an event."""

    def __init__(self, event: str, patterns: Any) -> None:
        setattr(self, event, lambda trainer: trainer.set_trainable(patterns))


def two_layers(self: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    return model


def only_what_trains(self: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize(
    ("event", "patterns", "error", "message"),
    [
        ("on_before_train", "2.*", ValueError, r"`patterns` has '2\.\*', but no parameter has such a name. The first"),
        ("on_before_train", [], ValueError, r"`patterns` must be names or patterns such as \"head\.\*\", but is \[\]"),
        ("on_before_train", ["1.*", 0], ValueError, "`patterns` must be names or patterns"),
        (
            "on_before_train",
            ["0.weight", "1.*"],
            ValueError,
            r"0\.weight cannot be trained, since the optimizer",
        ),
        ("on_before_optimizer_step", "1.*", RuntimeError, "in the middle of step 1"),
    ],
)
def test_mistakes_are_told(event: str, patterns: Any, error: type[Exception], message: str) -> None:
    hooks = lambda self: [Calls(event, patterns)]  # noqa: E731
    trainer = SmallTrainer(model_=two_layers, optimizer_=only_what_trains, hooks_=hooks)
    with pytest.raises(error, match=message):
        trainer.train()
    assert [param.requires_grad for param in trainer.model.parameters()] == [False, False, True, True]


def test_what_is_changed_past_the_trainer_is_refused() -> None:
    """With the call that does it."""

    class Thaws(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            trainer.model.requires_grad_(True)

    trainer = SmallTrainer(model_=two_layers, optimizer_=only_what_trains, hooks_=lambda self: [Thaws()])
    with pytest.raises(ValueError, match=r"call `trainer\.set_trainable`"):
        trainer.train()
