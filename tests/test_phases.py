"""Steps of several phases, against plain loops over the same samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import BaseHook, CheckpointingHook, EmaHook, LoggingHook
from trainloop.checkpoint import Checkpoint

from .launching import REPOSITORY, launch
from .workers import phases
from .workers.phases import NUM_MICRO, STEPS, Game, plain

NAMES = ("discriminator", "generator")
WORKER = REPOSITORY / "tests" / "workers" / "phases.py"


@pytest.mark.parametrize(("game", "form"), [("dcgan", "mapping"), ("vqgan", "mapping"), ("vqgan", "whole")])
def test_the_phases_are_those_of_a_plain_loop(game: str, form: str) -> None:
    """Losses, norms and weights of each phase are the same, bit for bit, with accumulation, clipping and a schedule."""
    trainer = Game(game, form)
    trainer.train()
    rows, weights = plain(game)
    assert [row.keys() for row in trainer.losses.rows] == [row.keys() for row in rows]
    for own, row in zip(trainer.losses.rows, rows, strict=True):
        assert own == {name: pytest.approx(values, rel=1e-6) for name, values in row.items()}
    state = trainer.state_dict()["model"]
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert all(param.requires_grad for param in trainer.model.parameters())


@pytest.mark.parametrize("form", ["ddp2", "fsdp2"])
def test_the_phases_on_two_ranks(form: str, tmp_path: Path) -> None:
    """The same under DDP and FSDP2, and bit for bit after a resume. FSDP2 says what a gradient penalty needs there.
    Phases that differ between the ranks are an error on all of them before the window, also if only one has changed.
    """
    launch(WORKER, form, str(tmp_path), form, timeout=120)
    *games, penalty = [*json.loads((tmp_path / "done.json").read_text()), *([""] if form == "ddp2" else [])]
    assert games == [["dcgan", "mapping"], ["vqgan", "mapping"], ["vqgan", "whole"]]
    both, one = zip(*(json.loads((tmp_path / f"errors{rank}.json").read_text()) for rank in range(2)), strict=True)
    text = "Step 3: `phases` and calls of `set_trainable` must be the same on every rank, at the same step, but are not"
    told = f"{text} (rank 0: phases ('generator',); rank 1: phases ('generator', 'discriminator'))."
    assert both == (["RankDisagreementError", told, 2],) * 2
    told = f"{text} (rank 1: phases ('generator', 'discriminator'); rank 0: goes on as before)."
    assert one[1] == ["RankDisagreementError", told, 2]
    assert one[0][0] == "TrainingError"
    assert "Rank 1 (process " in one[0][1]
    assert f"ended with RankDisagreementError: {told}" in one[0][1]
    assert (
        form == "ddp2" or "call `set_reshard_after_forward(False)` and `set_reshard_after_backward(False)`" in penalty
    )


def test_events_and_records_of_a_phase() -> None:
    """Hooks hear the update of each phase, and the end of the step once; records, norms and rates are by name."""
    logged = Logged()
    trainer = Game("dcgan", hooks=[LoggingHook(1), logged], max_steps=1)
    trainer.train()
    assert trainer.losses.events == [
        *((event, name) for name in NAMES for event in ("before", "after")),
        ("step", None),
    ]
    (records,) = logged.records
    assert records["discriminator"].keys() == records["generator"].keys() == {"loss", "grad_norm", "real"}
    assert records["loss"] == pytest.approx(sum(records[name]["loss"] for name in NAMES))
    assert records["grad_norm"] == pytest.approx(sum(records[name]["grad_norm"] ** 2 for name in NAMES) ** 0.5)
    assert records["lr"] == pytest.approx({"generator": 2e-2, "discriminator": 1e-2})


def test_the_last_phase_ends_the_epoch(tmp_path: Path) -> None:
    """An interval of an epoch is known when the step is over."""
    hooks = [CheckpointingHook("epoch", keep_previous=9)]
    trainer = Game("dcgan", hooks=hooks, max_steps=None, max_epochs=2, workspace=tmp_path)
    trainer.train()
    folders = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert folders == [f"step_{STEPS:07}", f"step_{2 * STEPS:07}"]


class Logged(BaseHook):
    def __init__(self) -> None:
        self.records: list[Any] = []

    def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
        self.records.append(records["train"])


class Broken(Game):
    """One window of the generator has a NaN."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, str | None, float]] = []

    def forward(self, batch: Any) -> Any:
        loss, records = super().forward(batch)
        self.seen.append((self.step, self.phase, float(batch[0].sum())))
        is_bad = self.step == 2 and self.phase == "generator" and not self.step_info.non_finite_grad_retry_count
        return loss * (float("nan") if is_bad else 1.0), records


def test_a_phase_that_is_not_finite_is_tried_again_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It draws a new window; what an earlier phase has applied stays."""
    trainer = Broken("dcgan", max_steps=2)
    with caplog.at_level(logging.WARNING, "trainloop"):
        trainer.train()
    seen = {name: [total for step, other, total in trainer.seen if (step, other) == (2, name)] for name in NAMES}
    assert seen["generator"][:NUM_MICRO] == seen["discriminator"]
    assert len(seen["generator"]) == 2 * NUM_MICRO
    assert not set(seen["generator"][NUM_MICRO:]) & set(seen["discriminator"])
    assert trainer.step_info.phases["generator"].non_finite_grad_retry_count == 1
    assert trainer.step_info.phases["discriminator"].non_finite_grad_retry_count == 0
    assert "Step 2, phase 'generator': the gradient is not finite." in caplog.text
    counts = {name: {int(state["step"]) for state in trainer.optimizer[name].state.values()} for name in NAMES}
    assert counts == {"generator": {2}, "discriminator": {2}}


def test_an_exception_between_two_phases_is_an_update_that_was_interrupted() -> None:
    """The discriminator has stepped and the generator has not, so the run can't go on in this process."""

    class Fails(Game):
        def forward(self, batch: Any) -> Any:
            if self.step == 2 and self.phase == "generator":
                raise KeyError("data")
            return super().forward(batch)

    trainer = Fails("dcgan")
    with pytest.raises(KeyError):
        trainer.train()
    assert trainer.phase is None
    assert all(param.requires_grad for param in trainer.model.parameters())
    with pytest.raises(RuntimeError, match="The update of step 2 was interrupted"):
        trainer.train()


def test_one_scaler_serves_all_phases() -> None:
    """An overflow in one phase lowers the scale and repeats that phase only; a window of no loss is replaced."""

    class Overflows(Broken):
        def build_grad_scaler(self) -> Any:
            return torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def forward(self, batch: Any) -> Any:
            loss, records = Game.forward(self, batch)
            self.seen.append((self.step, self.phase, 0.0))
            is_bad = self.step == 2 and self.phase == "generator" and not self.step_info.overflow_count
            return loss * (float("inf") if is_bad else 1.0), records

    trainer = Overflows("dcgan", max_steps=3)
    trainer.train()
    assert trainer.grad_scaler is not None
    assert trainer.grad_scaler.get_scale() == 2.0**9
    assert len(trainer.seen) == 7 * NUM_MICRO


def test_a_resume_is_exact(tmp_path: Path) -> None:
    """Interrupted after any step, the average of the generator included."""
    whole = Game("vqgan", hooks=[EmaHook(0.5, module="generator")])
    whole.train()
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        hooks = [CheckpointingHook(1), EmaHook(0.5, module="generator")]
        first = Game("vqgan", workspace=folder, max_steps=step, hooks=hooks)
        first.train()
        hooks = [CheckpointingHook(9), EmaHook(0.5, module="generator")]
        second = Game("vqgan", workspace=folder, hooks=hooks)
        second.train()
        assert first.losses.rows + second.losses.rows == whole.losses.rows
        for group in ("model", "ema"):
            pairs = zip(whole.state_dict()[group].items(), second.state_dict()[group].items(), strict=True)
            assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    manifest = Checkpoint.open(folder / "checkpoints" / f"step_{STEPS:07}").manifest
    assert {name.split(".")[0] for name in manifest.tensors["model"]} == {"generator", "discriminator"}


class Weighted(Game):
    def batch_weight(self, batch: Any) -> float:
        self.num_weighed = getattr(self, "num_weighed", 0) + 1
        return 1.0


def test_weights_are_agreed_on_once_a_window() -> None:
    trainer = Weighted("dcgan")
    trainer.train()
    assert trainer.num_weighed == STEPS * NUM_MICRO
    rows, _ = plain("dcgan")
    for own, row in zip(trainer.losses.rows, rows, strict=True):
        assert own == {name: pytest.approx(values, rel=1e-5) for name, values in row.items()}


one_sgd: dict[str, Any] = {"build_optimizer": lambda self: torch.optim.SGD(self.model.parameters(), lr=0.1)}


def variant(**methods: Any) -> type[Game]:
    return type("Variant", (Game,), methods)


@pytest.mark.parametrize(
    ("kwargs", "methods", "message"),
    [
        ({}, {"phases": lambda self: ("critic",)}, r"out of those of the optimizers \(generator, discriminator\)"),
        ({}, {"phases": lambda self: ()}, r"but returned \(\)"),
        ({}, {"phases": lambda self: "generator"}, "must return a tuple of different names"),
        ({}, {"phases": lambda self: ("generator", "generator")}, "must return a tuple of different names"),
        (
            {},
            {**one_sgd, "build_lr_scheduler": lambda self: None},
            "but it returned one optimizer",
        ),
        (
            {},
            {"build_lr_scheduler": lambda self: torch.optim.lr_scheduler.ConstantLR(self.optimizer)},
            "but it returned one schedule",
        ),
        ({"grad_clip": {"critic": 1.0}}, {}, "`grad_clip` names 'critic', but the phases are generator, discriminator"),
        ({"grad_clip": {"generator": 0.0}}, {}, r"`grad_clip\['generator'\]` must be positive and finite, but is 0.0"),
        ({}, {"build_model": lambda self: {"a.b": nn.Linear(1, 1)}}, "without a slash or a dot, but one is 'a.b'"),
        ({}, {"build_model": lambda self: {}}, "`build_model` must return names that are strings"),
    ],
)
def test_mistakes_are_told(kwargs: dict[str, Any], methods: dict[str, Any], message: str) -> None:
    """Before the first update, with what to return instead."""
    with pytest.raises((ValueError, KeyError), match=message):
        variant(**methods)("dcgan", **kwargs).train()


def test_a_mapping_of_modules_needs_no_phases() -> None:
    """One loss through both modules, one optimizer: the modules are one model."""

    class Joint(Game):
        phases = phases.BaseTrainer.phases

        def build_optimizer(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

        def build_lr_scheduler(self) -> Any:
            return None

        def forward(self, batch: Any) -> Any:
            return self.model["discriminator"](self.model["generator"](batch[1])).pow(2).mean(), {}

    trainer = Joint("dcgan", grad_clip=1.0)
    trainer.train()
    assert {name.split(".")[0] for name in trainer.named_parameters()} == set(NAMES)
