"""Optimizers that train other weights than the ones to evaluate (schedule-free): each has its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, EvaluationHook
from trainloop.checkpoint import Checkpoint

from .small import SmallTrainer

BETA = 0.9


class ScheduleFree(torch.optim.Optimizer):
    """SGD in the form of `schedulefree.SGDScheduleFree`, with its protocol and its state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "train_mode": False, "k": 0})

    @torch.no_grad()
    def _move(self, train_mode: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for param in group["params"]:
                    if "z" in self.state[param]:
                        param.lerp_(self.state[param]["z"], weight)
                group["train_mode"] = train_mode

    def eval(self) -> None:
        self._move(False, 1 - 1 / BETA)

    def train(self) -> None:
        self._move(True, 1 - BETA)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.param_groups[0]["train_mode"], "as schedulefree: not in train mode when step is called"
        for group in self.param_groups:
            for param in group["params"]:
                z = self.state[param].setdefault("z", param.clone())
                share = 1 / (group["k"] + 1)
                param.lerp_(z, share)
                param.add_(param.grad, alpha=group["lr"] * (BETA * (1 - share) - 1))
                z.sub_(param.grad, alpha=group["lr"])
            group["k"] += 1


def averaged(trainer: BaseTrainer) -> list[torch.Tensor]:
    """The weights that the optimizer has averaged, computed here."""
    optimizer: Any = trainer._raw_optimizer
    return [p.detach().lerp(optimizer.state[p]["z"], 1 - 1 / BETA) for p in trainer.model.parameters()]


def loss_at(weights: list[torch.Tensor], batch: torch.Tensor) -> float:
    return nn.functional.linear(batch, *weights).pow(2).mean().item()


class Held(BaseHook):
    """What an evaluation has found after each second step, and what it should have found."""

    def __init__(self, ema: EmaHook | None = None) -> None:
        self.found: list[float] = []
        self.wanted: list[float] = []
        self.weights: list[torch.Tensor] = []
        self.ema = ema

    def on_after_step(self, trainer: BaseTrainer) -> None:
        batch = held_out()
        if self.ema is not None:
            with self.ema.swapped(trainer):
                self.wanted.append(loss_at([p.detach().clone() for p in trainer.model.parameters()], batch))
                self.found.append(trainer.evaluate()["loss"])
        else:
            self.wanted.append(loss_at(averaged(trainer), batch))
            self.found.append(trainer.evaluate()["loss"])
        self.weights = [p.detach().clone() for p in trainer.model.parameters()]


def held_out() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(4, 3)


class Trainer(SmallTrainer):
    def build_eval_data_loader(self) -> Any:
        return DataLoader(TensorDataset(held_out()), batch_size=4)


def make(steps: int, *hooks: BaseHook, **kwargs: Any) -> Trainer:
    optimizer = lambda self: ScheduleFree(self.model.parameters(), 0.3)  # noqa: E731
    return Trainer(steps, optimizer_=optimizer, hooks_=lambda self: list(hooks), **kwargs)


def test_an_evaluation_sees_the_averaged_weights_and_leaves_the_run_alone() -> None:
    """It finds the loss of the optimizer's average; the run goes on with every bit as without an evaluation."""
    held = Held()
    evaluated, plain = make(60, held), make(60)
    evaluated.train()
    plain.train()
    assert held.found == pytest.approx(held.wanted, rel=1e-5)
    for a, b in zip(evaluated.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def mixed(model: Any) -> dict[str, torch.optim.Optimizer]:
    return {"free": ScheduleFree([model.weight], 0.3), "sgd": torch.optim.SGD([model.bias], lr=0.1, momentum=0.9)}


def test_a_schedule_free_optimizer_beside_another_one(tmp_path: Path) -> None:
    """In a mapping, the run is that of a plain loop, bit for bit, evaluated and resumed or not. Evaluations and the end
    of the run see the averaged weights of the one and the weights of the other.
    """

    class Found(BaseHook):
        def __init__(self) -> None:
            self.pairs: list[list[float]] = []

        def on_after_step(self, trainer: BaseTrainer) -> None:
            free: Any = trainer.optimizer["free"]  # type: ignore[index]
            weight, bias = (p.detach() for p in trainer.model.parameters())
            average = weight.lerp(next(iter(free.state.values()))["z"], 1 - 1 / BETA)
            self.pairs.append([trainer.evaluate()["loss"], loss_at([average, bias], held_out())])

    def trainer_of(steps: int, *hooks: BaseHook) -> tuple[Trainer, list[list[float]]]:
        found = Found()
        options: dict[str, Any] = {"optimizer_": lambda self: mixed(self.model), "workspace": tmp_path}
        return Trainer(steps, hooks_=lambda self: [found, *hooks], **options), found.pairs

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizers: Any = mixed(model)
    optimizers["free"].train()
    batches = (torch.arange(24.0).reshape(8, 3) / 24).split(2)
    for step in range(8):
        model(batches[step % 4]).pow(2).mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    optimizers["free"].eval()
    whole, pairs = trainer_of(8)
    whole.train()
    trainer_of(5, CheckpointingHook(5))[0].train()
    resumed, later = trainer_of(8, CheckpointingHook(9))
    resumed.train()
    for name, param in model.named_parameters():
        for trainer in (whole, resumed):
            assert torch.equal(trainer.named_parameters()[name], param)
    assert later == pairs[5:]
    assert [loss for loss, _ in pairs] == pytest.approx([wanted for _, wanted in pairs], rel=1e-5)


def test_an_average_of_the_weights_is_evaluated_as_it_is() -> None:
    """Within `EmaHook.swapped` the optimizer leaves the weights alone."""
    ema = EmaHook(0.9)
    held = Held(ema)
    trainer, plain = make(8, ema, held, EvaluationHook(2, ema=ema)), make(8)
    trainer.train()
    plain.train()
    assert held.found == pytest.approx(held.wanted, rel=1e-6)
    for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_run_ends_with_the_averaged_weights_and_can_go_on() -> None:
    """After `train` the model has what is to be used; another `train` continues as if there had been no end."""
    held = Held()
    trainer = make(5, held)
    trainer.train()
    assert loss_at([p.detach() for p in trainer.model.parameters()], held_out()) == pytest.approx(held.wanted[-1])
    assert trainer.evaluate()["loss"] == pytest.approx(held.wanted[-1])
    trainer.max_steps = 8
    trainer.train()
    whole = make(8)
    whole.train()
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_has_both_and_resumes_exactly(tmp_path: Path) -> None:
    """`model/` is what the run goes on with, bit for bit; `averaged/` is what to evaluate and to export."""
    held = Held()
    make(5, held, CheckpointingHook(5), workspace=tmp_path).train()
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "step_0000005")
    assert {"model", "averaged"} <= checkpoint.manifest.tensors.keys()
    read = {name: torch.empty(record.shape) for name, record in checkpoint.manifest.tensors["averaged"].items()}
    checkpoint.read_into("averaged", read)
    assert loss_at([read["weight"], read["bias"]], held_out()) == pytest.approx(held.wanted[-1])
    resumed, whole = make(9, CheckpointingHook(5), workspace=tmp_path), make(9)
    resumed.train()
    whole.train()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
