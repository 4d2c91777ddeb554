"""What is saved is what comes back: schedules, optimizers, modules and buffers of every kind, in one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from trainloop import BaseHook, BaseTrainer, CheckpointError, CheckpointingHook
from trainloop.checkpoint import CheckpointStore

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer
from .workers import state as worker

STEPS = 8


class Recorder(BaseHook):
    """What the optimizer's groups hold after each step."""

    def __init__(self) -> None:
        self.groups: list[Any] = []

    def on_after_step(self, trainer: BaseTrainer) -> None:
        groups = trainer.optimizer.param_groups
        self.groups.append([{key: value for key, value in group.items() if key != "params"} for group in groups])


def adamw(trainer: SmallTrainer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainer.model.parameters(), lr=0.1)


def run(path: Path, load: Any = None, steps: int = STEPS, interval: int = 1, **kwargs: Any) -> SmallTrainer:
    """A run that saves every `interval` steps and keeps all checkpoints. Its recorder is `run(...).recorder`."""
    recorder = Recorder()
    hooks = kwargs.pop("hooks", [])
    saving = CheckpointingHook(interval, keep_interval=1, path=path, load=load)
    trainer = SmallTrainer(steps, hooks_=lambda self: [recorder, *hooks, saving], **kwargs)
    trainer.recorder = recorder  # type: ignore[attr-defined]
    trainer.train()
    return trainer


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS + 1, three_phase=True),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.MultiStepLR(o, [3]), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.MultiStepLR(o, [2])], [4]
    ),
    "SequentialLR of three": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, total_iters=2),
            lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
            lr_scheduler.OneCycleLR(o, 0.1, STEPS),
        ],
        [2, 5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_from_any_step(name: str, tmp_path: Path) -> None:
    """Killed after any step, every scheduler of torch gives the hyperparameters of the undisturbed run, and their
    types: betas stay a tuple.
    """
    kwargs = {"optimizer_": adamw, "lr_scheduler_": lambda self: SCHEDULES[name](self.optimizer)}
    whole = run(tmp_path / "whole", **kwargs).recorder.groups
    for step in range(1, STEPS):
        rest = run(tmp_path / f"{step}", load=tmp_path / "whole" / f"step_{step:07d}", interval=99, **kwargs)
        assert repr(rest.recorder.groups) == repr(whole[step:]), f"resumed after step {step}"


WORKER = REPOSITORY / "tests" / "workers" / "state.py"


@pytest.fixture(scope="module", params=["single", "ddp3", "fsdp3"])
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """All cases in one launch: the form, and for each rank how the undisturbed run and the resumed one ended."""
    out = tmp_path_factory.mktemp(request.param)
    launch(WORKER, request.param, str(out))
    return request.param, [
        json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES[request.param])
    ]


@pytest.mark.parametrize("case", worker.CASES)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(ends: tuple[str, list[dict[str, Any]]], case: str) -> None:
    """Modules that save in their own way, extra state, optimizers with state of their own, buffers of every kind and
    frozen parameters that `forward` changes: bit for bit, with the average of the weights.
    """
    form, results = ends
    if case == "Fp8" and form == "ddp3":
        pytest.skip("DDP shares buffers over gloo, which knows no fp8")
    for own in results:
        if case == "Lookahead" and form == "fsdp3":
            assert "has a tensor at inner/state/" in own[case][0], own[case]
            assert "that FSDP2 has sharded" in own[case][0]
            continue
        assert len(own[case]) == 2, own[case]
        assert own[case][0] == own[case][1]


# ---------------------------------------------------------------------- health


def test_one_huge_gradient_makes_the_checkpoint_unhealthy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A gradient of 1e25 leaves infinity in AdamW's state for good: the save says so, and a restart loads the healthy
    checkpoint before it.
    """

    def forward(self: SmallTrainer, batch: Any) -> Any:
        loss = self.model(batch[0]).pow(2).mean()
        return loss * (1e25 if self.step == 3 else 1.0), {}

    kwargs = {"optimizer_": adamw, "forward_": forward}
    with caplog.at_level("WARNING"):
        trainer = run(tmp_path, steps=4, **kwargs)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    infos = CheckpointStore(tmp_path).checkpoints()
    assert [(info.step, info.health) for info in infos] == [(1, True), (2, True), (3, False), (4, False)]
    assert (
        "The checkpoint of step 3 is saved, but it is not healthy: there are infinities or NaN in optim/" in caplog.text
    )
    assert run(tmp_path, load="latest", steps=2, **kwargs).step == 2


@pytest.mark.parametrize("is_persistent", [True, False])
def test_nan_in_a_buffer_makes_the_checkpoint_unhealthy(tmp_path: Path, is_persistent: bool) -> None:
    """A floating-point statistic that has become NaN; a mask of -inf that the model was built with is none."""

    class Net(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("mask", torch.full((2,), float("-inf")), persistent=is_persistent)
            self.register_buffer("mean", torch.zeros(2), persistent=is_persistent)

    def forward(self: SmallTrainer, batch: Any) -> Any:
        if self.step == 2:
            self.model.mean[0] = float("nan")
        return self.model(batch[0]).pow(2).mean(), {}

    run(tmp_path, steps=2, model_=lambda self: Net(), forward_=forward)
    assert [info.health for info in CheckpointStore(tmp_path).checkpoints()] == [True, False]


# ---------------------------------------------------------------------- what the code says, and what is refused


class Table(torch.nn.Linear):
    """A buffer that is not persistent, of which the code says the value."""

    def __init__(self, value: float, size: int = 2) -> None:
        super().__init__(3, 1)
        self.register_buffer("table", torch.full((size,), value), persistent=False)


@pytest.mark.parametrize(("value", "size"), [(2.0, 2), (1.0, 3)])
def test_a_buffer_that_is_not_persistent_is_what_the_code_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float, size: int
) -> None:
    """Its value was changed from 1 to 2, or its length, between two starts: the new one holds, and the log says so.
    What `forward` has made of an unchanged one comes back.
    """

    def forward(self: SmallTrainer, batch: Any) -> Any:
        self.model.table += 1.0
        return self.model(batch[0]).pow(2).mean(), {}

    run(tmp_path, steps=2, model_=lambda self: Table(1.0), forward_=forward)
    same = run(tmp_path, "latest", 3, model_=lambda self: Table(1.0), forward_=forward)
    assert same.model.table.tolist() == [4.0, 4.0]
    with caplog.at_level("WARNING"):
        changed = run(tmp_path, 2, 3, model_=lambda self: Table(value, size), forward_=forward)
    assert changed.model.table.tolist() == [value + 1] * size
    assert "built with other values than in the saved run, and keep the new values: table." in caplog.text
    with caplog.at_level("WARNING"):  # random features of another seed are the run's, not the code's
        seeded = run(tmp_path, 2, 3, model_=lambda self: Table(value, size), forward_=forward, seed=1)
    assert seeded.model.table.tolist() == [4.0, 4.0]
    assert "because the seed is another, and get the saved values: table." in caplog.text


def test_adams_state_becomes_adamws(tmp_path: Path) -> None:
    """`__setstate__` is called at a resume, as torch's loading calls it: AdamW decays as AdamW does."""
    trainer, other = (
        SmallTrainer(2, optimizer_=lambda self, kind=kind: kind(self.model.parameters()))
        for kind in (torch.optim.Adam, torch.optim.AdamW)
    )
    trainer.train()
    other.load_state_dict(trainer.state_dict())
    assert other.optimizer.param_groups[0]["decoupled_weight_decay"] is True


class Hidden(torch.optim.SGD):
    """An inner optimizer that no `state_dict` shows."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, lr=0.1)
        self.inner = torch.optim.Adam(params)


class Forgetful(torch.nn.Linear):
    """Leaves a trained parameter out of its `state_dict`."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.detach()


class Lambda(BaseHook):
    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        state_dict["counts"] = {"by_name": [Path("a")]}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"optimizer_": lambda self: Hidden(self.model.parameters())}, "Hidden keeps another optimizer in `inner`"),
        ({"model_": lambda self: Forgetful(3, 1)}, "leaves out parameters that are trained.*: bias"),
        ({"hooks": [Lambda()]}, r"at hooks/counts/by_name/0 there is a value .*PosixPath"),
    ],
)
def test_what_would_be_lost_is_refused_at_the_first_save(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    """Nothing is found out at the resume: the error names the place."""
    with pytest.raises((TypeError, ValueError, CheckpointError), match=message):
        run(tmp_path, steps=2, **kwargs)
    assert not CheckpointStore(tmp_path).checkpoints()


# ---------------------------------------------------------------------- load_state_dict while the run goes on


class Rewind(BaseHook):
    """Takes the state after step 2, and puts it back once after step 4, or where it says."""

    def __init__(self, event: str) -> None:
        self.event, self.states = event, []

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 2 and not self.states:
            self.states.append(copy.deepcopy(trainer.state_dict()))
        self._rewind(trainer, "on_after_step")

    def on_before_step(self, trainer: BaseTrainer) -> None:
        self._rewind(trainer, "on_before_step")

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        self._rewind(trainer, "on_before_optimizer_step")

    def on_after_optimizer_step(self, trainer: BaseTrainer) -> None:
        self._rewind(trainer, "on_after_optimizer_step")

    def _rewind(self, trainer: BaseTrainer, event: str) -> None:
        if event == self.event and trainer.step == 4 and len(self.states) == 1:
            self.states.append({})
            trainer.load_state_dict(self.states[0])


def noisy(seen: list[Any]) -> Callable[..., Any]:
    def forward(self: SmallTrainer, batch: Any) -> Any:
        noise = torch.rand(())
        seen.append((self.step, batch[0].sum().item(), noise.item()))
        return self.model(batch[0] + noise).pow(2).mean(), {}

    return forward


def shuffled(self: SmallTrainer) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(10, 3)), 2, shuffle=True)


def test_a_state_that_is_loaded_after_a_step_is_whole() -> None:
    """Steps, data and noise go on from the loaded state at once, and the end is that of a run that never rewound."""
    ends, records = [], []
    for hooks in ([], [Rewind("on_after_step")]):
        seen: list[Any] = []
        trainer = SmallTrainer(
            6, hooks_=lambda self, h=hooks: h, forward_=noisy(seen), data_loader=shuffled, optimizer_=adamw
        )
        trainer.train()
        ends.append([p.tolist() for p in trainer.model.parameters()])
        records.append(seen)
    plain, rewound = records
    assert rewound == plain[:4] + plain[2:]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("event", ["on_before_step", "on_before_optimizer_step", "on_after_optimizer_step"])
def test_a_state_is_not_loaded_in_the_middle_of_a_step(event: str) -> None:
    """It would mix two states: a clear error."""
    trainer = SmallTrainer(6, hooks_=lambda self: [Rewind(event)])
    with pytest.raises(RuntimeError, match="`load_state_dict` was called in the middle of step 4, which would mix two"):
        trainer.train()
