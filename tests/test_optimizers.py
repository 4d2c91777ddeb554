"""Several optimizers that step together, against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, CheckpointingHook, EmaHook, LoggingHook
from trainloop.step import update

from .launching import REPOSITORY, launch
from .small import SmallTrainer
from .workers import optimizers as workers

WORKER = REPOSITORY / "tests" / "workers" / "optimizers.py"
LRS = torch.optim.lr_scheduler
STEPS = 6


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def muon_and_adamw(self: Any) -> dict[str, torch.optim.Optimizer]:
    """The matrices go to Muon, the rest to AdamW."""
    named = list(self.model.named_parameters())
    return {
        "muon": torch.optim.Muon([p for _, p in named if p.ndim == 2], lr=0.02, weight_decay=0.1),
        "adamw": torch.optim.AdamW(
            [{"params": [named[1][1]], "lr": 1e-3}, {"params": [named[3][1]], "name": "last"}], lr=1e-2
        ),
    }


def schedules(self: Any) -> dict[str, Any]:
    return {"muon": LRS.ExponentialLR(self.optimizer["muon"], 0.9), "adamw": LRS.StepLR(self.optimizer["adamw"], 2)}


def loader(self: Any) -> DataLoader[Any]:
    x = torch.linspace(-1, 1, 24 * 3).reshape(24, 3)
    return DataLoader(TensorDataset(x, x[:, :2] ** 2), batch_size=4)


def forward(self: Any, batch: Any) -> Any:
    inputs, targets = batch
    return nn.functional.mse_loss(self.model(inputs), targets), {}


class Losses(BaseHook):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.lr: dict[int, Any] = {}
        self.norms: list[float] = []

    def on_after_step(self, trainer: Any) -> None:
        self.losses.append(trainer.step_info.loss.item())
        self.norms.append(trainer.step_info.grad_norm)

    def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
        self.lr[trainer.step] = records["train"]["lr"]


def make(*hooks: BaseHook, steps: int = STEPS, **kwargs: Any) -> tuple[SmallTrainer, Losses]:
    losses = Losses()
    options: dict[str, Any] = {
        "model_": lambda self: model(),
        "optimizer_": muon_and_adamw,
        "lr_scheduler_": schedules,
        "data_loader": loader,
        "forward_": forward,
        "hooks_": lambda self: [losses, *hooks],
        "grad_clip": 0.05,
        **kwargs,
    }
    return SmallTrainer(steps, **options), losses


def plain() -> tuple[list[float], list[float], nn.Module]:
    """The same without the trainer."""
    torch.manual_seed(0)
    losses, norms = [], []

    class Script:
        pass

    script: Any = Script()
    script.model = model()
    script.optimizer = muon_and_adamw(script)
    own_schedules = schedules(script)
    batches = list(loader(script))
    for step in range(STEPS):
        inputs, targets = batches[step % len(batches)]
        loss = nn.functional.mse_loss(script.model(inputs), targets)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(script.model.parameters(), 0.05).item())
        for optimizer in script.optimizer.values():
            optimizer.step()
            optimizer.zero_grad()
        for schedule in own_schedules.values():
            schedule.step()
        losses.append(loss.item())
    return losses, norms, script.model


def test_muon_and_adamw_step_together() -> None:
    """Losses, norms and weights are those of a plain loop, bit for bit; learning rates have the optimizers' names."""
    trainer, recorded = make(LoggingHook(1))
    trainer.train()
    losses, norms, expected = plain()
    assert (recorded.losses, recorded.norms) == (losses, norms)
    pairs = zip(trainer.model.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert recorded.lr[3] == pytest.approx({"muon": 0.02 * 0.9**2, "adamw/0": 1e-4, "adamw/last": 1e-3})


@pytest.fixture(scope="module", params=["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def lives(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 has seen of a run on 2 processes, of one that went on from its step 3 on 3 processes, and of one that
    went on from step 6 of that in a single process; and of an uninterrupted run in a single process.
    """
    out = tmp_path_factory.mktemp(request.param)
    step = "checkpoints/step_000000"
    launch(WORKER, f"{request.param}2", str(out), "two", timeout=120)
    launch(WORKER, f"{request.param}3", str(out), "three", str(out / "two" / f"{step}3"), timeout=120)
    found = {name: json.loads((out / f"{name}0.json").read_text()) for name in ("two", "three")}
    found["is_sharded"] = request.param == "fsdp"
    found["one"] = workers.run(out, "one", out / "three" / f"{step}6")
    found["whole"] = workers.run(out, "whole")
    return found


def test_muon_and_adamw_at_any_number_of_processes(lives: dict[str, Any]) -> None:
    """Losses and norms of each step are those of a plain loop, over epochs that end within a window, on 2 processes and
    after resumes at 3 and at 1. Muon computes in bf16, so a sum in another order shows. At the same number of
    processes a resume has the same bits.
    """
    rows, weights = workers.plain()
    assert lives["two"]["again"]
    for name, first in (("whole", 1), ("two", 1), ("three", 4), ("one", 7)):
        own = dict(lives[name]["rows"])
        assert list(own) == list(rows)[first - 1 :]
        for step, row in own.items():
            assert row == pytest.approx(rows[step], rel=1e-6 if name == "whole" else 2e-3), (name, step)
    assert all(lives["whole"]["state"][name] == value.flatten().tolist() for name, value in weights.items())


def test_muon_refuses_a_matrix_with_fewer_rows_than_shards(lives: dict[str, Any]) -> None:
    """Before the first step, with the remedy. torch fails at the first update, in terms of its dispatcher."""
    told = lives["three"]["refused"]
    assert "4.weight (2 x 8), which FSDP2 has cut into 3 shards. Give it to another optimizer" in told or not told
    assert bool(told) == lives["is_sharded"]


def test_epochs_go_on_at_another_number_of_processes(lives: dict[str, Any]) -> None:
    """With the same steps, the same ends and the same limit."""
    for name, first in (("whole", 1), ("two", 1), ("three", 4), ("one", 7)):
        assert lives[name]["ends"] == [step for step in workers.ENDS if step >= first], name
        assert (lives[name]["epoch"], lives[name]["steps"]) == (workers.EPOCHS, [workers.ENDS[-1], 2])


def test_the_state_of_each_optimizer_is_resharded(lives: dict[str, Any]) -> None:
    """Momentum of Muon, moments and counters of AdamW, and the average end as in a run that never stopped."""
    whole = lives["whole"]["state"]
    assert {"0.weight/momentum_buffer", "0.bias/exp_avg", "0.bias/step", "ema/0.weight"} <= whole.keys()
    for name in ("two", "three", "one"):
        assert lives[name]["state"].keys() == whole.keys()
        for key, values in whole.items():
            own, expected = torch.tensor(lives[name]["state"][key]), torch.tensor(values)
            assert (own - expected).norm() <= 0.02 * expected.norm(), (name, key)  # element by element bf16 shows more


@pytest.mark.parametrize("step", [1, 3])
def test_a_resume_is_exact(tmp_path: Path, step: int) -> None:
    """State, groups and schedules of each optimizer come back, and the average."""
    whole, all_losses = make(EmaHook(0.5))
    whole.train()
    first, before = make(CheckpointingHook(1), EmaHook(0.5), steps=step, workspace=tmp_path)
    first.train()
    second, after = make(CheckpointingHook(9), EmaHook(0.5), workspace=tmp_path)
    second.train()
    assert before.losses + after.losses == all_losses.losses
    for key, value in whole.state_dict()["ema"].items():
        assert torch.equal(value, second.state_dict()["ema"][key])
    assert whole.optimizer["adamw"].param_groups[0]["lr"] == second.optimizer["adamw"].param_groups[0]["lr"]


def test_one_schedule_may_move_all() -> None:
    """A scheduler of `self.optimizer` sets the learning rates of every optimizer."""
    trainer, recorded = make(LoggingHook(1), lr_scheduler_=lambda self: LRS.ExponentialLR(self.optimizer, 0.5))
    trainer.train()
    assert recorded.lr[3] == pytest.approx({"muon": 0.005, "adamw/0": 2.5e-4, "adamw/last": 2.5e-3})


def test_one_scaler_decides_for_all() -> None:
    """An overflow in a gradient of one optimizer stops both, and lowers the scale once."""
    calls: list[int] = []

    def overflow(self: Any, batch: Any) -> Any:
        loss, records = forward(self, batch)
        calls.append(0)
        if len(calls) == 3:
            loss = loss + self.model[2].bias.sum() * float("inf")
        return loss, records

    scaler = lambda self: torch.amp.GradScaler("cpu", init_scale=2.0**10)  # noqa: E731
    trainer, _ = make(forward_=overflow, grad_scaler_=scaler, lr_scheduler_=lambda self: None, steps=4)
    trainer.train()
    assert (len(calls), trainer.grad_scaler.get_scale()) == (5, 2.0**9)
    assert {int(state["step"]) for state in trainer.optimizer["adamw"].state.values()} == {4}


def test_fused_optimizers_hide_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is read last if every optimizer can skip its step on the device; the run is the same, bit for bit."""

    def fused(self: Any, **kwargs: Any) -> dict[str, torch.optim.Optimizer]:
        first, last = self.model[0], self.model[2]
        sgd = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9, fused=True)
        return {"sgd": sgd, "adam": torch.optim.Adam(last.parameters(), **kwargs)}

    def sometimes_nan(self: Any, batch: Any) -> Any:
        loss, records = forward(self, batch)
        bad = self.step in (1, 3) and not self.step_info.non_finite_grad_retry_count
        return loss * (float("nan") if bad else 1.0), records

    options: dict[str, Any] = {"lr_scheduler_": lambda self: None, "forward_": sometimes_nan}
    options["optimizer_"] = lambda self: fused(self, fused=True)
    reference, first = make(**options)
    reference.train()
    assert not reference._update.reads_last
    monkeypatch.setattr(update, "DEVICES", {"cpu"})
    trainer, last = make(**options)
    trainer.train()
    assert trainer._update.reads_last
    assert last.losses == first.losses
    mixed, _ = make(**{**options, "optimizer_": fused})
    mixed.train()
    assert not mixed._update.reads_last


def test_hyperparameters_of_the_script_win(tmp_path: Path) -> None:
    """`on_resume` sets those of each optimizer, and the table names them by optimizer."""
    first, _ = make(CheckpointingHook(1), steps=2, workspace=tmp_path, lr_scheduler_=lambda self: None)
    first.train()

    def other(self: Any) -> Any:
        optimizers = muon_and_adamw(self)
        optimizers["muon"].param_groups[0]["lr"] = 0.5
        return optimizers

    hook = CheckpointingHook(9, on_resume=["hyperparameters"])
    second, _ = make(hook, workspace=tmp_path, optimizer_=other, lr_scheduler_=lambda self: None)
    second.train()
    assert second.optimizer["muon"].param_groups[0]["lr"] == 0.5
    assert second.settings["optimizer/muon/0/lr"] == 0.5
    assert second.settings["optimizer"] == "muon: Muon, adamw: AdamW"


def test_other_optimizers_than_the_saved_ones_are_told(tmp_path: Path) -> None:
    """Another name or number of optimizers is refused before anything is changed, or begins anew on request."""
    first, _ = make(CheckpointingHook(1), steps=2, workspace=tmp_path, lr_scheduler_=lambda self: None)
    first.train()
    sgd = lambda self: torch.optim.SGD(self.model.parameters(), lr=0.1)  # noqa: E731
    second, _ = make(CheckpointingHook(9), workspace=tmp_path, optimizer_=sgd, lr_scheduler_=lambda self: None)
    with pytest.raises(ValueError, match=r"returns SGD, but .* was saved with muon: Muon, adamw: AdamW"):
        second.train()
    reversed_order = lambda self: dict(reversed(muon_and_adamw(self).items()))  # noqa: E731
    state = first.state_dict()
    third, _ = make(optimizer_=reversed_order, lr_scheduler_=lambda self: None)
    with pytest.raises(
        ValueError, match=r"of the optimizers muon, adamw, but `build_optimizer` gives the optimizers a"
    ):
        third.load_state_dict(state)
    hook = CheckpointingHook(9, on_resume=["optimizer"])
    fourth, _ = make(hook, workspace=tmp_path, optimizer_=sgd, lr_scheduler_=lambda self: None)
    fourth.train()
    assert fourth.step == STEPS


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (
            lambda o, m: {**o, "again": torch.optim.SGD([m[0].weight], lr=0.1)},
            "muon and again .* both have .* 0.weight",
        ),
        (lambda o, m: {"muon": o["muon"]}, r"No optimizer of `build_optimizer` \(muon\) has the parameter 0.bias"),
        (lambda o, m: {}, "but there are none"),
        (
            lambda o, m: {"a/b": o["muon"]},
            "strings without a slash or a dot, but one is 'a/b'",
        ),
        (lambda o, m: {1: o["muon"]}, "but one is 1"),
    ],
)
def test_what_the_mapping_may_not_be(optimizers: Any, message: str) -> None:
    """Each parameter that is trained is in one optimizer, told before the first step."""
    trainer, _ = make(
        optimizer_=lambda self: optimizers(muon_and_adamw(self), self.model), lr_scheduler_=lambda s: None
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_frozen_parameter_needs_no_optimizer() -> None:
    def frozen(self: Any) -> nn.Module:
        built = model()
        built[2].bias.requires_grad_(False)
        return built

    def optimizers(self: Any) -> Any:
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        return {"muon": torch.optim.Muon(matrices), "sgd": torch.optim.SGD([self.model[0].bias], lr=0.1)}

    trainer, _ = make(model_=frozen, optimizer_=optimizers, lr_scheduler_=lambda self: None)
    trainer.train()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            lambda self: {"other": LRS.ConstantLR(self.optimizer["muon"])},
            "a schedule of 'other', but the optimizers are",
        ),
        (
            lambda self: {"muon": {"scheduler": LRS.ReduceLROnPlateau(self.optimizer["muon"]), "monitor": "val/loss"}},
            "ReduceLROnPlateau for 'muon'",
        ),
        (lambda self: {"muon": LRS.OneCycleLR(self.optimizer["muon"], 0.1, total_steps=3)}, "ends at step 3"),
    ],
)
def test_what_the_schedules_may_not_be(schedule: Any, message: str) -> None:
    trainer, _ = make(lr_scheduler_=schedule)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_export_has_a_file_for_each(tmp_path: Path) -> None:
    """Accelerate loads it into two optimizers and two schedules of its own."""
    from accelerate import Accelerator

    from trainloop.checkpoint import Checkpoint
    from trainloop.checkpoint.tools.export_accelerate import export_accelerate

    trainer, _ = make(CheckpointingHook(9), workspace=tmp_path)
    trainer.train()
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "step_0000006")
    export_accelerate(checkpoint, tmp_path / "exported")
    script: Any = type("Script", (), {})()
    accelerator = Accelerator(cpu=True)
    script.model = accelerator.prepare(model())
    script.optimizer = muon_and_adamw(script)
    prepared = accelerator.prepare(*script.optimizer.values(), *schedules(script).values())
    accelerator.load_state(tmp_path / "exported")
    for own, name in zip(prepared[:2], ("muon", "adamw"), strict=True):
        expected = trainer.optimizer[name]
        assert [g["lr"] for g in own.param_groups] == [g["lr"] for g in expected.param_groups]
        for a, b in zip(own.state.values(), expected.state.values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)
    with pytest.raises(ValueError, match="holds 2 optimizers, and Accelerate can't load several under FSDP2"):
        export_accelerate(checkpoint, tmp_path / "other", fsdp2=True)
