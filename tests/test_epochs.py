"""`max_epochs`, `trainer.epoch`, and intervals of an epoch, against a plain loop over the same samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from trainloop import BaseHook, CheckpointingHook, EvaluationHook, LoggingHook, ProgressHook

from .small import SmallTrainer


class Stream(IterableDataset[torch.Tensor]):
    """An iterable data set of the samples, with or without a length."""

    def __init__(self, samples: torch.Tensor) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.samples)


class SizedStream(Stream, Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return len(self.samples)


class Recorder(BaseHook):
    """What a hook sees of the epochs, and every step's loss."""

    def __init__(self) -> None:
        self.epochs_in_step: list[int] = []
        self.ends: list[int] = []
        self.finished: list[int] = []
        self.losses: list[float] = []

    def on_before_step(self, trainer: Any) -> None:
        self.epochs_in_step.append(trainer.epoch)

    def on_after_step(self, trainer: Any) -> None:
        self.losses.append(trainer.step_info.loss.item())
        if trainer.is_due("epoch"):
            self.ends.append(trainer.step)
        if trainer.is_finished:
            self.finished.append(trainer.step)


def samples(num: int) -> torch.Tensor:
    return torch.arange(3.0 * num).reshape(num, 3) / (3 * num)


def trainer_of(num: int, kind: str = "map", drop_last: bool = False, **kwargs: Any) -> tuple[SmallTrainer, Recorder]:
    recorder = Recorder()
    x = samples(num)

    def loader(self: Any) -> Any:
        data: Any = {"map": TensorDataset(x), "stream": Stream(x), "sized": SizedStream(x)}.get(kind)
        if kind == "list":
            return list(x.split(3))
        return DataLoader(data, batch_size=3, drop_last=drop_last)

    def forward(self: Any, batch: Any) -> Any:
        return self.model(batch[0] if kind == "map" else batch).pow(2).mean(), {}

    hooks = kwargs.pop("hooks", [])
    options: dict[str, Any] = {"max_steps": None, "gradient_accumulation_steps": 2, **kwargs}
    trainer = SmallTrainer(data_loader=loader, forward_=forward, hooks_=lambda self: [recorder, *hooks], **options)
    return trainer, recorder


def plain_losses(num: int, max_epochs: int, drop_last: bool = False) -> list[float]:
    """A loop without the trainer: epochs follow each other without a gap, two batches of 3 make a step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = samples(num)[: num // 3 * 3 if drop_last else num]
    batches = torch.cat([x] * (max_epochs + 1)).split(3)
    num_steps = -(-max_epochs * len(x) // 6)
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = torch.stack([model(batch).pow(2).mean() for batch in batches[2 * step : 2 * step + 2]]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("num", "kind", "drop_last", "ends"),
    [
        (11, "map", False, [2, 4, 6]),  # windows straddle the ends at 11, 22 and 33 samples
        (12, "map", False, [2, 4, 6]),
        (11, "map", True, [2, 3, 5]),  # 9 samples an epoch
        (11, "sized", False, [2, 4, 6]),
        (12, "sized", False, [2, 4, 6]),
        (11, "sized", True, [2, 3, 5]),
        (12, "list", False, [2, 4, 6]),
        (11, "stream", False, [2, 4, 6]),
    ],
)
def test_a_run_of_epochs_takes_the_steps_of_a_plain_loop(num: int, kind: str, drop_last: bool, ends: list[int]) -> None:
    """Every sample is seen `max_epochs` times and no step follows; the losses are those of a loop without trainloop."""
    trainer, recorder = trainer_of(num, kind, drop_last, max_epochs=3)
    trainer.train()
    assert recorder.ends == ends
    assert recorder.finished == [ends[-1]]
    assert trainer.epoch == 3
    firsts = [0] + [step + 1 for step in ends]
    assert recorder.epochs_in_step == [
        epoch for epoch, (a, b) in enumerate(itertools.pairwise([1, *firsts[1:]])) for _ in range(b - a)
    ]
    torch.testing.assert_close(recorder.losses, plain_losses(num, 3, drop_last), rtol=1e-6, atol=0)
    if kind != "stream":
        assert trainer.max_steps == ends[-1]
        assert trainer.steps_per_epoch == ends[0]


def test_data_without_a_length_has_no_number_of_steps() -> None:
    """There is no `max_steps`, no schedule can be built on it, and the end is noticed with the first batch after it."""
    progress = ProgressHook()
    trainer, recorder = trainer_of(12, "stream", max_epochs=1, hooks=[progress, LoggingHook(2)])
    with pytest.warns(UserWarning, match="not written anywhere"):
        trainer.train()
    assert (trainer.max_steps, trainer.steps_per_epoch) == (None, None)
    assert recorder.ends == recorder.finished == [3]


def test_the_first_limit_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """With both limits the run ends at the one that comes first, and goes on when the limit that ended it is raised."""
    trainer, recorder = trainer_of(12, max_steps=3, max_epochs=9)
    trainer.train()
    assert (trainer.step, trainer.epoch, recorder.finished) == (3, 1, [3])
    trainer, recorder = trainer_of(12, max_steps=30, max_epochs=1)
    trainer.train()
    assert (trainer.step, trainer.epoch, trainer.max_steps) == (2, 1, 30)
    with caplog.at_level("INFO", "trainloop"):
        trainer.train()
    assert "it has reached step 2, and `max_steps` is 30 and `max_epochs` is 1. To continue, raise" in caplog.text
    trainer.max_epochs = 2
    trainer.train()
    assert (trainer.step, recorder.finished) == (4, [2, 4])


def test_a_schedule_is_built_for_the_epochs() -> None:
    """`build_lr_scheduler` finds the steps of the run; one that is too short for them is refused before the first."""

    def one_cycle(self: Any) -> Any:
        seen.append((self.max_steps, self.max_epochs, self.steps_per_epoch))
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=self.max_steps - short)

    seen: list[Any] = []
    short = 0
    trainer, _ = trainer_of(11, max_epochs=3, lr_scheduler_=one_cycle)
    trainer.train()
    assert seen == [(6, 3, 2)]
    short = 1
    trainer, _ = trainer_of(11, max_epochs=3, lr_scheduler_=one_cycle)
    with pytest.raises(ValueError, match="`max_steps` is 6, but OneCycleLR ends at step 5"):
        trainer.train()


def test_discarded_windows_and_other_accumulation_move_the_last_step() -> None:
    """A window that was discarded has been seen; a hook that changes the accumulation changes the number of steps."""

    def forward(self: Any, batch: Any) -> Any:
        loss = self.model(batch[0]).pow(2).mean()
        calls.append(0)
        return (loss * float("nan") if len(calls) == 2 else loss), {}

    calls: list[int] = []
    trainer, recorder = trainer_of(12, max_epochs=2, hooks=[])
    trainer.given["forward_"] = forward
    trainer.train()
    assert len(calls) == 8
    assert (trainer.step, trainer.max_steps, recorder.ends) == (3, 3, [1, 3])

    class Halve(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            trainer.gradient_accumulation_steps = 1

    trainer, recorder = trainer_of(12, max_epochs=2, hooks=[Halve()])
    trainer.train()
    assert (trainer.step, trainer.max_steps, recorder.ends, trainer.steps_per_epoch) == (7, 7, [3, 7], 4)


def test_hooks_take_an_epoch_as_their_interval(tmp_path: Path) -> None:
    """Checkpoints, evaluations, reports: with the first step whose window ends an epoch."""
    hooks = [
        CheckpointingHook("epoch", keep_previous=9),
        EvaluationHook("epoch", data_loader=[samples(4)], at_end=False),
        Logged(),
        LoggingHook("epoch"),
        ProgressHook("epoch"),
    ]
    trainer, recorder = trainer_of(11, "list", max_epochs=2, max_steps=9, workspace=tmp_path, hooks=hooks)
    trainer.train()
    assert recorder.ends == [2, 4]
    logged = hooks[2]
    assert isinstance(logged, Logged)
    assert logged.steps == {"val": [2, 4], "train": [2, 4]}
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_0000002", "step_0000004"]


class Logged(BaseHook):
    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
        for name in records:
            self.steps.setdefault(name, []).append(trainer.step)


@pytest.mark.filterwarnings("ignore:The data has no `state_dict`")
@pytest.mark.parametrize(("num", "kind"), [(11, "map"), (12, "map"), (11, "sized"), (12, "list")])
def test_a_resume_goes_on_in_its_epoch(tmp_path: Path, num: int, kind: str) -> None:
    """Interrupted after any step, the run ends at the same step, with the same ends of epochs and the same losses."""
    trainer, whole = trainer_of(num, kind, max_epochs=3)
    trainer.train()
    for step in range(1, 6):
        folder = tmp_path / str(step)
        first, before = trainer_of(num, kind, max_epochs=3, workspace=folder, hooks=[CheckpointingHook(1), Stop(step)])
        first.train()
        hooks = [CheckpointingHook(100, on_resume=["stop"])]
        second, after = trainer_of(num, kind, max_epochs=3, workspace=folder, hooks=hooks)
        second.train()
        assert (second.step, second.epoch, second.max_steps) == (trainer.step, 3, trainer.max_steps)
        assert before.ends + after.ends == whole.ends
        assert before.losses + after.losses == whole.losses
        assert before.epochs_in_step + after.epochs_in_step == whole.epochs_in_step


class Stop(BaseHook):
    """Has the run end with a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_step(self, trainer: Any) -> None:
        if trainer.step == self.step:
            trainer.request_stop()


def test_a_stopped_run_of_epochs_goes_on_when_they_are_raised(tmp_path: Path) -> None:
    """It stays stopped at the same limit, and goes on with more epochs."""
    for max_epochs, expected in ((2, 1), (2, 1), (3, 6)):
        hooks = [CheckpointingHook(1), *([Stop(1)] if max_epochs == 2 else [])]
        trainer, _ = trainer_of(12, max_epochs=max_epochs, workspace=tmp_path, hooks=hooks)
        trainer.train()
        assert trainer.step == expected


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"max_steps": None}, ValueError, "`max_steps` and `max_epochs` are both None. Pass one of them"),
        ({"max_epochs": -1}, ValueError, "`max_epochs` must be at least 0, but is -1"),
        ({"max_epochs": 1.5}, TypeError, "`max_epochs` must be an integer or None, but is 1.5"),
    ],
)
def test_limits_are_checked_at_construction(kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        SmallTrainer(**kwargs)


@pytest.mark.parametrize("make", [CheckpointingHook, EvaluationHook, LoggingHook, ProgressHook])
def test_a_misspelt_interval_is_told(make: Any) -> None:
    with pytest.raises(ValueError, match="`interval` must be a number of steps or \"epoch\", but is 'epochs'"):
        make("epochs")
