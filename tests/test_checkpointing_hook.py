"""Saves that fail, runs that end by an exception, and state of every kind: through the hook, as a run meets them."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import BaseHook, CheckpointError, CheckpointingHook
from trainloop.checkpoint import CheckpointStore, FileSystem
from trainloop.state.saved import content_of
from trainloop.testing import lives
from trainloop.testing.comparison import differences
from trainloop.testing.lives import live, path_prefix

from .small import SmallTrainer
from .workers.resume import make_trainer


class Do(BaseHook):
    """Calls `action(trainer)` after each step."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_after_step(self, trainer: Any) -> None:
        self.action(trainer)


def trainer_of(tmp_path: Path, max_steps: int, *hooks: BaseHook, **kwargs: Any) -> SmallTrainer:
    given = {"hooks_": lambda self: list(hooks), "optimizer_": lambda self: torch.optim.AdamW(self.model.parameters())}
    return SmallTrainer(max_steps, workspace=tmp_path, **{**given, **kwargs})


def steps_on_disk(tmp_path: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*"))


# ---------------------------------------------------------------------- saves that fail


@pytest.fixture
def broken_at(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps whose saves fail."""
    steps: set[int] = set()
    write = FileSystem.write

    def fail(self: FileSystem, path: Path, buffers: Any, sync: bool = True) -> None:
        if any(f"step_{step:07d}" in str(path) for step in steps):
            raise OSError(28, "No space left on device")
        write(self, path, buffers, sync)

    monkeypatch.setattr(FileSystem, "write", fail)
    return steps


@pytest.mark.parametrize("is_async", [False, True])
def test_training_goes_on_until_too_many_saves_in_a_row_have_failed(
    tmp_path: Path, broken_at: set[int], caplog: pytest.LogCaptureFixture, is_async: bool
) -> None:
    """Each failure is told, the checkpoint before stays, a save that succeeds starts the count anew; one failure more
    than `max_failures` ends the run.
    """
    broken_at |= {2, 3, 5, 6, 7}
    trainer = trainer_of(tmp_path, 20, CheckpointingHook(1, max_failures=2, async_save=is_async))
    with pytest.raises(CheckpointError, match=r"step 7 was not saved.*No space left on device"):
        trainer.train()
    assert trainer.step in (7, 8)
    assert steps_on_disk(tmp_path) == [4]
    told = [line for line in caplog.messages if "Training continues." in line]
    assert [line.split("failed (")[1][:1] for line in told] == ["1", "2", "1", "2"]


def test_a_failed_async_save_is_told_at_the_next_step(
    tmp_path: Path, broken_at: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """And not only when the next one is due."""
    broken_at.add(10)
    told: list[int] = []

    def look(trainer: Any) -> None:
        while trainer.step == 11 and hook._store is not None and hook._store.busy():
            pass
        if any("step 10 was not saved" in line for line in caplog.messages):
            told.append(trainer.step)

    hook = CheckpointingHook(10, async_save=True)
    trainer_of(tmp_path, 19, Do(look), hook).train()
    assert told
    assert min(told) in (12, 13)


def test_the_last_save_is_tried_when_the_one_before_has_failed(tmp_path: Path, broken_at: set[int]) -> None:
    """A failure of an async save that comes to light at the end does not take the final checkpoint with it."""
    broken_at.add(4)
    trainer_of(tmp_path, 5, CheckpointingHook(2, async_save=True)).train()
    assert steps_on_disk(tmp_path) == [5]


def test_the_final_save_must_succeed(tmp_path: Path, broken_at: set[int]) -> None:
    """Whatever `max_failures`: the run does not end as if it were saved."""
    broken_at.add(5)
    with pytest.raises(CheckpointError, match="step 5 was not saved"):
        trainer_of(tmp_path, 5, CheckpointingHook(2)).train()
    assert steps_on_disk(tmp_path) == [4]


def test_a_disk_without_room_is_told_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Needed and free, at each save; the checkpoint before stays, and the run goes on when there is room again."""
    room = {2: 2**30, 4: 1000, 6: 1000}
    trainer = trainer_of(tmp_path, 8, CheckpointingHook(2, keep_previous=9))
    monkeypatch.setattr(FileSystem, "free_bytes", lambda self, path: room.get(trainer.step, 2**30))
    trainer.train()
    assert steps_on_disk(tmp_path) == [2, 8]
    told = [line for line in caplog.messages if "it needs 1.0 MiB, but the disk of" in line and "0.0 MiB free" in line]
    assert len(told) == 2


def test_a_disk_that_is_full_for_one_rank_costs_one_save(tmp_path: Path) -> None:
    """Both ranks go on together, the checkpoint before stays, and the message names the rank and the file; with
    `max_failures=0` both end with it.
    """
    live(partial(make_trainer, data="full", keep_previous=9), tmp_path / "run", num_processes=2)
    assert steps_on_disk(tmp_path / "run") == [2, 6, 8, 10, 12, 13]
    output = Path(f"{path_prefix(tmp_path / 'run', 1, 0)}.log").read_text()
    assert "Step 4: a save failed (1 in a row, at most 3 may). Training continues." in output
    assert "rank 1: OSError: [Errno 27] File too large: '" in output
    with pytest.raises(RuntimeError, match=r"ended with exit code 1(?s:.*)File too large"):
        live(partial(make_trainer, data="full", max_failures=0), tmp_path / "strict", num_processes=2)
    assert steps_on_disk(tmp_path / "strict") == [2]


# ---------------------------------------------------------------------- runs that end by an exception


@pytest.mark.parametrize("look_every", [0.005, 4.0])
def test_an_exception_on_one_rank_does_not_hang_on_a_save_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_every: float
) -> None:
    """The rank that fails finishes the async save with the others' threads, and goes: nobody waits for a timeout. It is
    the one that is told of, also where those that lost contact with it are found to have ended at the same time.
    """
    slowed = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(look_every))
    monkeypatch.setattr(lives, "time", slowed)
    with pytest.raises(RuntimeError, match=r"Rank 1 in life 1 .* exit code 1(?s:.*)MemoryError: on this rank only"):
        live(partial(make_trainer, data="raising", async_save=True), tmp_path / "run", num_processes=2, timeout=40)
    assert steps_on_disk(tmp_path / "run") == [4]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_save_in_flight_finished(tmp_path: Path, error: type[BaseException]) -> None:
    """Its own error comes out, the checkpoint is whole, the folder is free, and the signal handlers are as before."""
    before = signal.getsignal(signal.SIGUSR1)

    def fail(trainer: Any) -> None:
        if trainer.step == 3:
            raise error("no more")

    hook = CheckpointingHook(2, async_save=True, exit_signals="SIGUSR1")
    with pytest.raises(error, match="no more"):
        trainer_of(tmp_path, 9, hook, Do(fail)).train()
    assert steps_on_disk(tmp_path) == [2]
    assert signal.getsignal(signal.SIGUSR1) is before
    again = trainer_of(tmp_path, 5, CheckpointingHook(2))
    again.train()
    assert again.step == 5


def test_a_failed_save_never_hides_why_the_run_ended(
    tmp_path: Path, broken_at: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The exception that ended it comes out, the save's is told, and the hooks after this one hear of theirs."""
    before, heard = signal.getsignal(signal.SIGUSR1), []
    broken_at.add(2)

    class Hearing(BaseHook):
        def on_exception(self, trainer: Any, exception: BaseException) -> None:
            heard.append(exception)

    def fail(trainer: Any) -> None:
        if trainer.step == 3:
            raise RuntimeError("no more")

    write = FileSystem.write

    def slow(self: FileSystem, path: Path, buffers: Any, sync: bool = True) -> None:
        time.sleep(0.5)
        write(self, path, buffers, sync)

    hook = CheckpointingHook(2, async_save=True, exit_signals="SIGUSR1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "write", slow)
        with pytest.raises(RuntimeError, match="no more"):
            trainer_of(tmp_path, 9, hook, Hearing(), Do(fail)).train()
    assert [str(exception) for exception in heard] == ["no more"]
    assert any("step 2 was not saved" in line for line in caplog.messages)
    assert signal.getsignal(signal.SIGUSR1) is before


# ---------------------------------------------------------------------- state of every kind


class Odd(nn.Module):
    """Tied weights, a parameter without a gradient, a frozen one, 0-dim, bf16 and empty ones, buffers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("num_seen", torch.tensor(2**40))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("trace", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.frozen(self.second(self.first(x)))) * self.scale + self.low.float() * self.trace.clone()
        self.num_seen += len(x)
        self.flags.logical_not_()
        self.trace.lerp_(y.detach().mean(0), 0.1)
        return y


class Average(BaseHook):
    """State of a hook in every form that there is."""

    def __init__(self) -> None:
        self.average = {"a.b": torch.zeros(3), "c": torch.zeros((), dtype=torch.float64)}
        self.history: list[Any] = [float("nan"), {3: (1, "x")}]

    def on_after_step(self, trainer: Any) -> None:
        self.average["a.b"].lerp_(trainer.unwrapped_model.low.detach().float(), 0.3)
        self.average["c"] += trainer.step_info.loss.double()
        self.history = [*self.history[-3:], {trainer.step: self.average["c"].item()}]

    def on_state_dict(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        state_dict |= {"average": self.average, "my hook's": dict(self.average), "optim": {"optim": torch.ones(1)}}
        state_dict["history"] = self.history

    def on_load_state_dict(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        for key, value in state_dict["average"].items():
            self.average[key].copy_(value)
        assert torch.equal(state_dict["my hook's"]["c"], self.average["c"])
        assert torch.equal(state_dict["optim"]["optim"], torch.ones(1))
        self.history = state_dict["history"]


def groups(model: Any) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.requires_grad]
    others = [p for p in model.parameters() if p.dim() != 2 and p.requires_grad]
    return [{"params": matrices, "name": "matrices"}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]


def odd_trainer(path: Path, max_steps: int, *hooks: BaseHook) -> SmallTrainer:
    return trainer_of(
        path,
        max_steps,
        CheckpointingHook(100),
        Average(),
        *hooks,
        model_=lambda self: Odd(),
        optimizer_=lambda self: torch.optim.AdamW(groups(self.model), lr=1e-2, amsgrad=True),
        lr_scheduler_=lambda self: torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4]),
        forward_=lambda self, batch: (self.model(batch[0]).square().sum(), {}),
    )


def ended(trainer: SmallTrainer) -> dict[str, Any]:
    trainer.train()
    return {**trainer.live_state_dict(), "buffers": dict(trainer.unwrapped_model.named_buffers())}


def test_parameters_buffers_and_state_of_every_kind_come_back(tmp_path: Path) -> None:
    """Bit by bit, and so that the run goes on as if it had not been interrupted."""
    whole = ended(odd_trainer(tmp_path / "whole", 6))
    ended(odd_trainer(tmp_path / "cut", 3))
    assert list(differences(whole, ended(odd_trainer(tmp_path / "cut", 6)))) == []
    stored = (tmp_path / "cut" / "checkpoints" / "step_0000006" / "average").is_dir()
    assert stored, "a flat dict of tensors is a folder of weights"


class SaveFirst(BaseHook):
    """Saves before the first step, and after each."""

    def on_before_train(self, trainer: Any) -> None:
        self.store = CheckpointStore(trainer.workspace / "other")
        self.on_after_step(trainer)

    def on_after_step(self, trainer: Any) -> None:
        self.store.save(trainer.step, content_of(trainer, "run"), run_id="run")


OPTIMIZERS = [
    optimizer
    for name, optimizer in sorted(vars(torch.optim).items())
    if isinstance(optimizer, type) and name not in ("Optimizer", "SparseAdam", "LBFGS")  # other gradients, a closure
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.__name__)
def test_saving_changes_nothing_and_a_resume_goes_on_with_any_optimizer(tmp_path: Path, optimizer: Any) -> None:
    """Saved before the first step and after each, a run is bitwise the same as one that is never saved, and so is one
    that was resumed.
    """

    def trainer(path: Path, max_steps: int, *hooks: BaseHook) -> SmallTrainer:
        return trainer_of(
            path,
            max_steps,
            *hooks,
            model_=lambda self: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)),
            optimizer_=lambda self: optimizer(self.model.parameters(), lr=0.01),
        )

    whole = ended(trainer(tmp_path, 5))
    assert list(differences(whole, ended(trainer(tmp_path, 5, SaveFirst())))) == []
    ended(trainer(tmp_path, 2, CheckpointingHook(1)))
    assert list(differences(whole, ended(trainer(tmp_path, 5, CheckpointingHook(1))))) == []


@pytest.mark.parametrize(
    ("values", "dtype", "is_healthy"),
    [
        ([1.0, -2.0, 0.0], torch.float32, True),
        ([3e38, 3e38, 3e38], torch.float32, True),  # whose sum overflows
        ([1e300, 1e300, 1e300], torch.float64, True),
        ([6e4, 6e4, 6e4], torch.float16, True),
        ([1.0, float("nan"), 0.0], torch.float32, False),
        ([float("inf"), -float("inf"), 0.0], torch.float32, False),
        ([1.0, 1.0, -float("inf")], torch.bfloat16, False),
        ([1.0, 1.0, complex(0.0, float("nan"))], torch.complex64, False),
        ([1.0, 1.0, 1j], torch.complex64, True),
    ],
)
def test_health_is_told_exactly(tmp_path: Path, values: list[Any], dtype: torch.dtype, is_healthy: bool) -> None:
    """Whether every parameter is finite, of any size and dtype; nothing else decides it."""

    def spoil(trainer: Any) -> None:
        with torch.no_grad():
            trainer.model.extra.copy_(torch.tensor(values, dtype=dtype))

    def model(trainer: Any) -> nn.Module:
        made = nn.Linear(3, 1)
        made.extra = nn.Parameter(torch.zeros(3, dtype=dtype))
        return made

    trainer_of(tmp_path, 1, CheckpointingHook(1), Do(spoil), model_=model).train()
    (info,) = CheckpointStore(tmp_path / "checkpoints").checkpoints()
    assert info.health is is_healthy
