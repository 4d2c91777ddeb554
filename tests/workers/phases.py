"""Trainers whose steps have phases, and the same as plain loops. As a script: compares the two on every rank.

Arguments: the folder for the results, and the form of the launch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, TrainingError
from trainloop.ranks import collectives

STEPS = 6
BATCH = 8
NUM_MICRO = 2
CLIP = {"discriminator": 0.3}
bce = nn.functional.binary_cross_entropy_with_logits
LRS = torch.optim.lr_scheduler


def dcgan() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6), nn.Tanh())
    discriminator = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    return {"generator": generator, "discriminator": discriminator}


def dcgan_loss(phase: str, models: Any, real: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    fake = models["generator"](noise)
    if phase == "generator":
        scores = models["discriminator"](fake)
        return bce(scores, torch.ones_like(scores))
    on_real, on_fake = models["discriminator"](real), models["discriminator"](fake.detach())
    return bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))


def optimizers(models: Any) -> dict[str, torch.optim.Optimizer]:
    return {
        "generator": torch.optim.Adam(models["generator"].parameters(), lr=2e-2, betas=(0.5, 0.999)),
        "discriminator": torch.optim.Adam(models["discriminator"].parameters(), lr=1e-2, betas=(0.5, 0.999)),
    }


def schedules(by_name: Any) -> dict[str, Any]:
    return {"discriminator": LRS.ExponentialLR(by_name["discriminator"], 0.8)}


class Autoencoder(nn.Module):
    """Quantizes to the nearest code, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(8, 6)
        self.codes = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.encoder(x)
        quantized = self.codes[torch.cdist(latents, self.codes).argmin(1)]
        commitment = (latents - quantized.detach()).pow(2).mean() + (latents.detach() - quantized).pow(2).mean()
        return self.decoder(latents + (quantized - latents).detach()), commitment


def vqgan() -> dict[str, nn.Module]:
    torch.manual_seed(2)
    return {"generator": Autoencoder(), "discriminator": nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))}


def vqgan_loss(phase: str, models: Any, real: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Hinge losses; the discriminator's has a penalty on its gradient with respect to the real samples."""
    fake, commitment = models["generator"](real)
    if phase == "generator":
        return (fake - real).pow(2).mean() + commitment - 0.1 * models["discriminator"](fake).mean()
    real = real.clone().requires_grad_()
    on_real, on_fake = models["discriminator"](real), models["discriminator"](fake.detach())
    (gradient,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
    hinge = (1 - on_real).relu().mean() + (1 + on_fake).relu().mean()
    return hinge + 0.5 * gradient.pow(2).sum(1).mean()


class WholeVqgan(nn.Module):
    """The same as one module, whose forward pass is the whole loss."""

    def __init__(self) -> None:
        super().__init__()
        models = vqgan()
        self.generator, self.discriminator = models["generator"], models["discriminator"]

    def __getitem__(self, name: str) -> nn.Module:
        part: nn.Module = getattr(self, name)
        return part

    def forward(self, phase: str, real: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return vqgan_loss(phase, self, real, noise)


def vqgan_phases(step: int) -> tuple[str, ...]:
    """The discriminator begins late, and comes first."""
    return ("discriminator", "generator") if step >= 3 else ("generator",)


GAMES: dict[str, Any] = {
    "dcgan": (dcgan, dcgan_loss, lambda step: ("discriminator", "generator")),
    "vqgan": (vqgan, vqgan_loss, vqgan_phases),
}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    num = STEPS * BATCH * NUM_MICRO
    return TensorDataset(torch.randn(num, 6, generator=generator), torch.randn(num, 4, generator=generator))


class Losses(BaseHook):
    """Losses and norms by step and phase."""

    def __init__(self) -> None:
        self.rows: list[dict[str, list[float]]] = []
        self.events: list[tuple[str, str | None]] = []

    def on_before_optimizer_step(self, trainer: Any) -> None:
        self.events.append(("before", trainer.phase))

    def on_after_optimizer_step(self, trainer: Any) -> None:
        self.events.append(("after", trainer.phase))

    def on_after_step(self, trainer: Any) -> None:
        self.events.append(("step", trainer.phase))
        phases = trainer.step_info.phases
        self.rows.append({name: [info.loss.item(), info.grad_norm] for name, info in phases.items()})


class Keep(BaseHook):
    """Under FSDP2 the discriminator's weights stay until its phase is over, as the penalty needs it."""

    def on_before_train(self, trainer: Any) -> None:
        if trainer.accelerator.is_fsdp2:
            model = trainer.model
            for module in model.values() if hasattr(model, "values") else [model]:
                module.set_reshard_after_forward(False)
                module.set_reshard_after_backward(False)


class Game(BaseTrainer):
    def __init__(self, game: str, form: str = "mapping", **kwargs: Any) -> None:
        self.game, self.form, self.losses = game, form, Losses()
        self.more_hooks: list[BaseHook] = kwargs.pop("hooks", [])
        self.keeps = kwargs.pop("keeps", True)
        options = {"grad_clip": CLIP, "gradient_accumulation_steps": NUM_MICRO, "seed": 0, **kwargs}
        super().__init__(options.pop("max_steps", STEPS), **options)

    def build_data_loader(self) -> Any:
        return DataLoader(data(), batch_size=BATCH // self.accelerator.num_processes)

    def build_model(self) -> Any:
        return WholeVqgan() if self.form == "whole" else GAMES[self.game][0]()

    def build_optimizer(self) -> Any:
        return optimizers(self.model)

    def build_lr_scheduler(self) -> Any:
        return schedules(self.optimizer)

    def build_hooks(self) -> list[BaseHook]:
        keeps = [Keep()] if self.game == "vqgan" and self.keeps else []
        return [self.losses, *keeps, *self.more_hooks]

    def phases(self) -> tuple[str, ...]:
        return GAMES[self.game][2](self.step)

    def forward(self, batch: Any) -> Any:
        frozen = {name: p.requires_grad for name, p in self.named_parameters().items()}
        assert all(needs == (self.phase in name) for name, needs in frozen.items()), (self.phase, frozen)
        if self.form == "whole":
            return self.model(self.phase, *batch), {}
        return GAMES[self.game][1](self.phase, self.model, *batch), {"real": batch[0].mean()}


def plain(game: str, num_ranks: int = 1) -> tuple[list[dict[str, list[float]]], dict[str, torch.Tensor]]:
    """The same as a loop without the trainer. Each rank's part of a batch goes through the models by itself."""
    build, loss_of, phases = GAMES[game]
    models = build()
    by_name = optimizers(models)
    own_schedules = schedules(by_name)
    real, noise = (tensor.split(BATCH) for tensor in data().tensors)
    rows = []
    for step in range(1, STEPS + 1):
        row = {}
        window = range(NUM_MICRO * (step - 1), NUM_MICRO * step)
        for phase in phases(step):
            for model in models.values():
                model.zero_grad()
            total = 0.0
            for i in window:
                chunks = zip(real[i].chunk(num_ranks), noise[i].chunk(num_ranks), strict=True)
                loss = torch.stack([loss_of(phase, models, *chunk) for chunk in chunks]).mean() / NUM_MICRO
                loss.backward()
                total += loss.item()
            params = list(models[phase].parameters())
            norm = torch.nn.utils.clip_grad_norm_(params, CLIP.get(phase, float("inf")))
            by_name[phase].step()
            if phase in own_schedules:
                own_schedules[phase].step()
            row[phase] = [total, norm.item()]
        rows.append(row)
    weights = {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    return rows, weights


def close(own: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Raise unless the rows are the same, averaged over the ranks."""
    assert [row.keys() for row in own] == [row.keys() for row in expected], own
    for row, other in zip(own, expected, strict=True):
        for name in row:
            loss = sum(collectives.gather_objects(row[name][0])) / collectives.world_size()
            torch.testing.assert_close([loss, row[name][1]], other[name], rtol=tolerance, atol=tolerance)


def compare(game: str, form: str, folder: Path) -> None:
    """Against the plain loop; then again, interrupted and resumed."""
    ema = EmaHook(0.5, module="generator")
    whole = Game(game, form, hooks=[ema])
    whole.train()
    close(whole.losses.rows, plain(game, collectives.world_size())[0])
    workspace = folder / f"{game}_{form}"
    first = Game(game, form, max_steps=3, workspace=workspace, hooks=[CheckpointingHook(3)])
    first.train()
    second = Game(game, form, workspace=workspace, hooks=[CheckpointingHook(9)])
    second.train()
    assert first.losses.rows + second.losses.rows == whole.losses.rows
    states = [trainer.state_dict()["model"] for trainer in (whole, second)]
    for name, tensor in states[0].items():
        a, b = (getattr(t, "full_tensor", lambda t=t: t)() for t in (tensor, states[1][name]))
        is_own_buffer = "running" in name or "num_batches" in name
        assert torch.equal(a, b) or is_own_buffer, name


class Differs(Game):
    """From step 3 on, rank 1 runs the phases in another order, and the other ranks as before or one phase only."""

    def __init__(self, others: tuple[str, ...]) -> None:
        self.others = others
        super().__init__("dcgan")

    def phases(self) -> tuple[str, ...]:
        names = super().phases()
        if self.step < 3:
            return names
        return names[::-1] if collectives.rank() == 1 else self.others


def error_of(others: tuple[str, ...]) -> list[Any]:
    trainer = Differs(others)
    try:
        trainer.train()
    except TrainingError as ex:
        return [type(ex).__name__, str(ex), trainer.step]
    raise AssertionError("no error")


def main() -> None:
    folder, form = Path(sys.argv[1]), sys.argv[2]
    done: list[Any] = []
    for game, model_form in (("dcgan", "mapping"), ("vqgan", "mapping"), ("vqgan", "whole")):
        compare(game, model_form, folder)
        done.append([game, model_form])
    if form.startswith("fsdp"):
        try:
            Game("vqgan", keeps=False).train()
        except RuntimeError as ex:
            done.append(str(ex))
    if collectives.rank() == 0:
        (folder / "done.json").write_text(json.dumps(done))
    errors = [error_of(("generator",))]
    errors.append(error_of(("discriminator", "generator")))  # last: rank 0 hears of it when rank 1 is gone
    (folder / f"errors{collectives.rank()}.json").write_text(json.dumps(errors))
    os._exit(0)  # as after an exception that nobody has caught: without waiting for what the other rank is in


if __name__ == "__main__":
    main()
