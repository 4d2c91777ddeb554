"""The average of the weights: the formulas of torch and diffusers, what counts as an update, and its limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, ProgressHook
from trainloop.checkpoint import Checkpoint

from .small import SmallTrainer


def average(trainer: BaseTrainer, name: str = "ema") -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in trainer.state_dict()[name].items()}


def train(hook: EmaHook, steps: int = 6, *others: BaseHook, **kwargs: Any) -> SmallTrainer:
    trainer = SmallTrainer(steps, hooks_=lambda self: [hook, *others], **kwargs)
    trainer.train()
    return trainer


class Weights(BaseHook):
    """The weight after each step, from the first."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.seen.append(trainer.unwrapped_model.weight.detach().clone())  # type: ignore[union-attr]


def test_it_is_torchs_average() -> None:
    """Bit for bit that of `torch.optim.swa_utils`, which copies at its first update as well."""

    class Torchs(BaseHook):
        def on_before_train(self, trainer: BaseTrainer) -> None:
            self.model = AveragedModel(trainer.unwrapped_model, multi_avg_fn=get_ema_multi_avg_fn(0.8))

        def on_after_step(self, trainer: BaseTrainer) -> None:
            self.model.update_parameters(trainer.unwrapped_model)

    torchs = Torchs()
    trainer = train(EmaHook(0.8), 6, torchs)
    for name, value in torchs.model.module.state_dict().items():
        assert torch.equal(average(trainer)[name], value)


@pytest.mark.parametrize(
    ("warmup", "diffusers"),
    [
        (None, lambda t: 0.8),
        ("ratio", lambda t: (1 + t) / (10 + t)),
        ("power", lambda t: 1 - (1 + t / 1.0) ** -(2 / 3)),
        (lambda t: 0.1 * t, lambda t: 0.1 * t),
    ],
)
@pytest.mark.parametrize("start_step", [0, 3])
def test_the_warm_up_is_that_of_diffusers(warmup: Any, diffusers: Callable[[int], float], start_step: int) -> None:
    """Written out as `EMAModel` has it, `update_after_step` included: decay 0 until one step after the start."""
    weights = Weights()
    trainer = train(EmaHook(0.8, warmup=warmup, start_step=start_step), 9, weights)
    shadow = torch.zeros(())
    for optimization_step, weight in enumerate(weights.seen, 1):
        t = max(0, optimization_step - start_step - 1)
        decay = 0.0 if t <= 0 else min(diffusers(t), 0.8)
        shadow = shadow - (1 - decay) * (shadow - weight)
    torch.testing.assert_close(average(trainer)["weight"], shadow, rtol=0, atol=1e-6)


def test_it_is_updated_at_its_interval_only() -> None:
    """Every third step: the copy at step 3, and two updates; in between it stays as it is."""
    weights, hook = Weights(), EmaHook(0.5, update_interval=3)
    trainer = train(hook, 11, weights)
    expected = weights.seen[2].lerp(weights.seen[5], 0.5).lerp(weights.seen[8], 0.5)
    assert torch.equal(average(trainer)["weight"], expected)
    assert hook.num_updates == 3


def test_a_discarded_window_is_no_update() -> None:
    """A run that retried a step has the average of one that never saw the bad data."""

    def forward(self: SmallTrainer, batch: Any) -> Any:
        loss = self.model(batch[0]).pow(2).mean()
        return loss * (math.nan if batch[0].isnan().any() else 1.0), {}

    def run(*bad: int) -> dict[str, torch.Tensor]:
        x = torch.arange(24.0).reshape(8, 3) / 24
        batches = [x[i : i + 2] for i in range(0, 8, 2)]
        for position in bad:
            batches.insert(position, torch.full((2, 3), math.nan))
        data = DataLoader(TensorDataset(torch.cat(batches)), batch_size=2)
        return average(train(EmaHook(0.7), 4, data_loader=lambda self: data, forward_=forward))

    healthy, retried = run(), run(1, 2, 4)
    assert all(torch.equal(healthy[name], retried[name]) for name in healthy)


def test_low_precision_weights_have_an_average_in_fp32() -> None:
    """In bf16 one update of 0.1 % would round to nothing."""
    trainer = SmallTrainer(6, model_=lambda self: nn.Linear(3, 1).bfloat16(), forward_=_low_precision)
    hook, weights = EmaHook(0.999), Weights()
    trainer.given["hooks_"] = lambda self: [hook, weights]
    trainer.train()
    expected = weights.seen[0].float()
    for weight in weights.seen[1:]:
        expected.lerp_(weight.float(), 1 - 0.999)
    assert average(trainer)["weight"].dtype == torch.float32
    assert torch.equal(average(trainer)["weight"], expected)
    before = trainer.model.weight.detach().clone()
    with hook.swapped(trainer):
        assert torch.equal(trainer.model.weight, expected.bfloat16())
    assert torch.equal(trainer.model.weight, before)
    assert torch.equal(average(trainer)["weight"], expected)


def _low_precision(self: SmallTrainer, batch: Any) -> Any:
    return self.model(batch[0].to(self.model.weight.dtype)).float().pow(2).mean(), {}


class Tied(nn.Module):
    """Two names for one weight, one that is frozen, a buffer, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.head(self.second(self.first(x)))


def test_the_folder_is_a_whole_model(tmp_path: Path) -> None:
    """Every name of the model's state, frozen and tied ones and saved buffers too; tied weights are stored once; and a
    plain `load_state_dict` takes it.
    """
    hook = EmaHook(0.5)
    trainer = train(hook, 4, CheckpointingHook(4), model_=lambda self: Tied(), workspace=tmp_path)
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "step_0000004")
    state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors("ema").items()}
    checkpoint.read_into("ema", state)
    fresh = Tied()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.first.weight, average(trainer)["first.weight"])
    assert fresh.second.weight is fresh.first.weight
    assert torch.equal(fresh.second.bias, trainer.model.second.bias)
    assert fresh.count == 4
    assert checkpoint.manifest.tensors["ema"]["second.weight"].alias_of == "first.weight"
    x = torch.ones(2, 3)
    assert torch.equal(fresh(x), hook.ema_model(x))
    assert not torch.equal(fresh(x), trainer.model(x))


def test_ema_model_is_one_object_that_is_brought_up_to_date() -> None:
    """The copy is made once; it is in eval mode and has no part in training."""
    hook = EmaHook(0.5)
    trainer = train(hook, 2)
    first = hook.ema_model
    before = first.weight.detach().clone()
    assert not first.training
    assert not first.weight.requires_grad
    trainer.max_steps = 4
    trainer.train()
    assert torch.equal(first.weight, before)
    assert hook.ema_model is first
    assert torch.equal(first.weight, average(trainer)["weight"])
    assert not torch.equal(first.weight, before)


def test_ema_model_keeps_the_autocast_that_accelerate_has_put_around_forward() -> None:
    """In bf16 Accelerate replaces the method `forward`; the copy's must compute with the copy's weights."""
    hook = EmaHook(0.0)  # the average is the weights
    trainer = train(hook, 2, mixed_precision="bf16")
    x = torch.ones(2, 3)
    assert torch.equal(hook.ema_model(x), trainer.model(x))
    with torch.no_grad():
        trainer.model.weight.zero_()
    assert not torch.equal(hook.ema_model(x), trainer.model(x))


def _replaced(how: str) -> nn.Module:
    """A model whose `forward` was replaced on the instance, or that a hook gives other weights."""
    model = nn.Linear(3, 1)
    original = model.forward
    if how == "closure":
        model.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    elif how == "weight in a closure":
        weight = model.weight
        model.forward = lambda x: x @ weight.T  # type: ignore[method-assign]
    elif how == "object":
        model.forward = Doubled(model)  # type: ignore[method-assign]
    else:
        model.register_forward_hook(lambda module, args, output: output + model.bias)
    return model


class Doubled:
    """A callable that deepcopy would copy, but that keeps the original."""

    def __init__(self, model: nn.Module) -> None:
        self.call = lambda x: 2 * nn.functional.linear(x, model.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


class Caching(nn.Linear):
    """Keeps what it has computed, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__(3, 1)
        self.how, self.kept, self.by_name, self.offset = how, None, {}, torch.ones(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x) * self.offset
        if self.how == "activation":
            self.kept = y
        elif self.how == "without gradient":
            self.kept = y.detach()
        elif self.how == "in a dict":
            self.by_name["y"] = [y.detach()]
        return y


REFUSED: dict[str, Callable[[], nn.Module]] = {
    **{how: partial(_replaced, how) for how in ("closure", "weight in a closure", "object", "hook")},
    **{how: partial(Caching, how) for how in ("activation", "without gradient", "in a dict")},
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(3, 1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", REFUSED)
def test_a_model_that_would_be_copied_wrongly_is_refused(how: str) -> None:
    """A copy that computes with the live weights is an error that names `swapped`, which is right for all of them."""
    hook = EmaHook(0.5)
    trainer = train(hook, 3, model_=lambda self: REFUSED[how]())
    with pytest.raises(RuntimeError, match=r"cannot be a copy of this model: .* `with hook.swapped\(trainer\)`"):
        hook.ema_model.eval()
    x = torch.ones(2, 3)
    live = trainer.model(x)
    with hook.swapped(trainer):
        assert not torch.equal(trainer.model(x), live)
    assert torch.equal(trainer.model(x), live)


class Harmless(Caching):
    """A constant in a plain attribute, a forward that captures nothing of the model, and a buffer that grows."""

    def __init__(self) -> None:
        super().__init__("nothing")
        self.register_buffer("queue", torch.zeros(1))
        self.scale = lambda x: 2 * x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.queue = torch.cat([self.queue, x.detach().sum()[None]])
        elif self.how == "in a copy":
            self.kept = super().forward(x)
        return self.scale(super().forward(x)) + self.queue.sum()


def test_ema_model_has_the_models_present_buffers_and_none_of_its_own_caches() -> None:
    """A buffer that has grown since the copy was made, and what the copy's `forward` has kept of earlier weights."""
    hook = EmaHook(0.5)
    trainer = train(hook, 2, model_=lambda self: Harmless())
    for _ in range(2):
        copied = hook.ema_model
        assert torch.equal(copied.queue, trainer.model.queue)
        assert copied.kept is None
        copied.how = "in a copy"
        x = torch.ones(2, 3)
        with hook.swapped(trainer):
            trainer.model.eval()
            assert torch.equal(copied(x), trainer.model(x))
            trainer.model.train()
        trainer.max_steps += 2
        trainer.train()


def test_saving_and_training_inside_swapped_are_refused(tmp_path: Path) -> None:
    """A checkpoint of averaged weights under the model's name would be the run's end; the error says to leave first."""
    hook = EmaHook(0.5)
    trainer = train(hook, 2)
    with hook.swapped(trainer):
        with pytest.raises(RuntimeError, match=r"asked for inside `EmaHook.swapped`.* Leave it first"):
            trainer.state_dict()
        with pytest.raises(RuntimeError, match="must be left before it is entered again"), hook.swapped(trainer):
            pass
        trainer.max_steps = 3
        with pytest.raises(RuntimeError, match=r"trained inside `EmaHook.swapped`"):
            trainer.train()
    trainer.state_dict()


def test_a_run_that_had_no_average_begins_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Resumed from a checkpoint without it, the average begins with the weights that were loaded, and it is said."""
    SmallTrainer(2, workspace=tmp_path, hooks_=lambda self: [CheckpointingHook(2)]).train()
    hook = EmaHook(0.5)
    trainer = SmallTrainer(2, workspace=tmp_path, hooks_=lambda self: [hook, CheckpointingHook(2)])
    with caplog.at_level("WARNING", "trainloop"):
        trainer.train()
    assert "The checkpoint has no average 'ema', so it starts from the weights." in caplog.text
    assert torch.equal(average(trainer)["weight"], trainer.model.weight)


def test_an_average_of_another_model_is_refused() -> None:
    """The error names what is missing."""
    state = train(EmaHook(0.5)).state_dict()
    del state["ema"]["bias"]
    with pytest.raises(ValueError, match="The saved average 'ema' has not the parameters: bias"):
        SmallTrainer(2, hooks_=lambda self: [EmaHook(0.5)]).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EmaHook(1.5), ValueError, "`decay` must be in [0, 1], but is 1.5."),
        (lambda: EmaHook("0.9"), TypeError, "`decay` must be a number, but is '0.9' (str)."),  # type: ignore[arg-type]
        (
            lambda: EmaHook(0.9, warmup="linear"),
            ValueError,
            "`warmup` must be one of ['ratio', 'power'], a function or None, but is 'linear'.",
        ),
        (lambda: EmaHook(0.9, update_interval=0), ValueError, "`update_interval` must be at least 1, but is 0."),
        (lambda: EmaHook(0.9, start_step=-1), ValueError, "`start_step` must be at least 0, but is -1."),
        (lambda: EmaHook(0.9, name="a/b"), ValueError, "`name` must be an identifier"),
        (lambda: EmaHook(0.9).ema_model, RuntimeError, "`ema_model` is there as soon as the run has begun"),
        (
            lambda: SmallTrainer(1, hooks_=lambda self: [EmaHook(0.9), EmaHook(0.99)]).train(),
            ValueError,
            "The `name`s of several EmaHooks must differ, but 2 have 'ema'.",
        ),
    ],
)
def test_wrong_use_is_an_error_that_names_it(make: Any, error: type[Exception], message: str) -> None:
    """At construction, or before the first step."""
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


class Constrain(BaseHook):
    """Keeps the weights small, as a hook may."""

    @torch.no_grad()
    def on_after_optimizer_step(self, trainer: Any) -> None:
        for param in trainer.model.parameters():
            param.clamp_(-0.1, 0.1)


def test_the_place_among_the_hooks_does_not_matter() -> None:
    """The average is taken of what all hooks have made of the weights, wherever EmaHook is in the list."""
    averages = []
    for order in itertools.permutations(range(3)):
        ema = EmaHook(0.5)
        hooks = [ema, Constrain(), ProgressHook(5)]
        trainer = SmallTrainer(6, hooks_=lambda self, hooks=hooks, order=order: [hooks[i] for i in order])
        trainer.train()
        averages.append([param.clone() for param in ema.ema_model.parameters()])
    assert all(torch.equal(a, b) for other in averages for a, b in zip(averages[0], other, strict=True))
    assert max(float(param.abs().max()) for param in averages[0]) < 0.1001


def test_a_part_of_the_model_is_averaged() -> None:
    """The other parts are the model's own in `ema_model`; a name that the model has not is told."""
    ema = EmaHook(0.5, module="0")
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    trainer = SmallTrainer(4, model_=lambda self: model, hooks_=lambda self: [ema])
    trainer.train()
    own, average = dict(model.named_parameters()), dict(ema.ema_model.named_parameters())
    assert {name: torch.equal(own[name], average[name]) for name in own} == {
        "0.weight": False,
        "0.bias": False,
        "1.weight": True,
        "1.bias": True,
    }
    trainer = SmallTrainer(hooks_=lambda self: [EmaHook(0.5, module="decoder")])
    with pytest.raises(ValueError, match="`module` of EmaHook is 'decoder', but the model has no parameters"):
        trainer.train()
