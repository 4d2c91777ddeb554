"""A restart with other settings says so: what the manifest records, what is in force, and what the script wins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook
from trainloop.checkpoint import Checkpoint
from trainloop.state.settings import describe_function
from trainloop.testing.lives import live, path_prefix, read_notes

from .small import SmallTrainer
from .tampering import rewrite
from .workers.resume import make_trainer


def data(num_samples: int = 8, **kwargs: Any) -> Callable[[Any], Any]:
    x = torch.arange(3.0 * num_samples).reshape(num_samples, 3) / 24
    return lambda self: DataLoader(TensorDataset(x), **{"batch_size": 2, **kwargs})


def adamw(**kwargs: Any) -> Callable[[Any], Any]:
    return lambda self: torch.optim.AdamW(self.model.parameters(), **{"lr": 0.1, **kwargs})


def cosine(length: int, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda self: schedules.CosineAnnealingLR(self.optimizer, length, **kwargs)


class Rates(BaseHook):
    """Notes the learning rate that each step uses."""

    def __init__(self, rates: dict[int, float]) -> None:
        self.rates = rates

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        self.rates[trainer.step] = trainer.optimizer.param_groups[0]["lr"]


def run(
    folder: Path, max_steps: int, *, on_resume: Any = (), rates: dict[int, float] | None = None, **kwargs: Any
) -> Any:
    """One life of a run that saves at its end."""
    hooks = [Rates(rates if rates is not None else {}), CheckpointingHook(100, on_resume=on_resume)]
    given = {"optimizer_": adamw(), "data_loader": data(), "hooks_": lambda self: hooks, **kwargs}
    trainer = SmallTrainer(max_steps, workspace=folder, **given)
    trainer.train()
    return trainer


def manifest_of(folder: Path, step: int) -> Any:
    return Checkpoint.open(folder / "checkpoints" / f"step_{step:07d}").manifest


def table_in(text: str) -> dict[str, list[str]]:
    """The rows of the table in a log, by setting; the last column is the name for `on_resume`, or missing."""
    lines = text.partition("  setting ")[2].splitlines()[1:]
    rows = [line.split("  ") for line in lines if line.startswith("  ")]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells}


# ---------------------------------------------------------------------- what is recorded and told


def test_the_manifest_records_the_settings(tmp_path: Path) -> None:
    """All that decides how the run trains, by flat name."""
    run(
        tmp_path,
        2,
        optimizer_=adamw(weight_decay=0.3),
        lr_scheduler_=cosine(9, eta_min=0.01),
        data_loader=data(shuffle=True, drop_last=True),
        grad_clip=0.5,
        gradient_accumulation_steps=2,
        seed=5,
    )
    settings = manifest_of(tmp_path, 2).settings
    wanted = {
        "max_steps": 2,
        "seed": 5,
        "gradient_accumulation_steps": 2,
        "grad_clip": 0.5,
        "mixed_precision": "no",
        "deterministic": None,
        "world_size": 1,
        "data/length": 8,
        "data/order": "RandomSampler, drop_last",
        "batch_size": 2,
        "num_workers": 0,
        "optimizer": "AdamW",
        "optimizer/0/lr": 0.1,
        "optimizer/0/weight_decay": 0.3,
        "optimizer/0/betas": [0.9, 0.999],
        "lr_scheduler": "CosineAnnealingLR",
        "lr_scheduler/T_max": 9,
        "lr_scheduler/eta_min": 0.01,
        "on_resume": [],
    }
    assert {key: settings.get(key) for key in wanted} == wanted
    assert not any("last_epoch" in key or "step_count" in key for key in settings)
    assert {"git_commit", "git_is_dirty"} <= settings.keys()
    assert settings["git_commit"] is None or len(settings["git_commit"]) == 40


def test_a_resume_with_the_same_settings_has_no_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every schedule of torch that has constants, and a seed that is drawn: nothing differs but `max_steps`."""
    made: list[Callable[[Any], Any]] = [
        lambda self: schedules.OneCycleLR(self.optimizer, 0.2, total_steps=50),
        lambda self: schedules.MultiStepLR(self.optimizer, [3, 30]),
        lambda self: schedules.CyclicLR(self.optimizer, 0.01, 0.1),
        lambda self: schedules.LambdaLR(self.optimizer, lambda step: 1 / (1 + step)),
        lambda self: schedules.CosineAnnealingWarmRestarts(self.optimizer, 3),
        lambda self: schedules.ChainedScheduler(
            [schedules.LinearLR(self.optimizer), schedules.ExponentialLR(self.optimizer, 0.9)]
        ),
    ]
    for i, scheduler in enumerate(made):
        folder = tmp_path / str(i)
        run(folder, 2, lr_scheduler_=scheduler, seed=None)
        caplog.clear()
        with caplog.at_level("INFO", "trainloop"):
            run(folder, 4, lr_scheduler_=scheduler, seed=None)
        assert table_in(caplog.text) == {"max_steps": ["2", "4", "4"]}


def test_one_table_tells_what_differs_and_what_is_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint wins in what it holds, the script in the rest; the table names the way to let the script win."""
    run(tmp_path, 2, lr_scheduler_=cosine(4), seed=1)
    rates: dict[int, float] = {}
    with caplog.at_level("INFO", "trainloop"):
        trainer = run(
            tmp_path,
            4,
            optimizer_=adamw(lr=0.5, weight_decay=0.7),
            lr_scheduler_=cosine(8),
            data_loader=data(16, batch_size=4, shuffle=True),
            grad_clip=1.0,
            seed=2,
            rates=rates,
        )
    assert table_in(caplog.text) == {
        "max_steps": ["2", "4", "4"],
        "seed": ["1", "2", "1"],
        "grad_clip": ["None", "1", "1"],
        "data/length": ["8", "16", "16", "data"],
        "data/order": ["SequentialSampler", "RandomSampler", "RandomSampler", "data"],
        "batch_size": ["2", "4", "4"],
        "optimizer/0/lr": ["0.1", "0.5", "0.1", "hyperparameters"],
        "optimizer/0/weight_decay": ["0.01", "0.7", "0.01", "hyperparameters"],
        "lr_scheduler/T_max": ["4", "8", "4", "lr_scheduler"],
    }
    assert caplog.text.count("The settings differ from those of the checkpoint of step 2.") == 1
    group = trainer.optimizer.param_groups[0]
    assert (group["weight_decay"], trainer.seed) == (0.01, 1)
    assert rates[3] == pytest.approx(0.05)  # cosine(4) on 0.1
    settings = manifest_of(tmp_path, 4).settings  # what is in force, so that the next resume compares with it
    assert (settings["optimizer/0/lr"], settings["lr_scheduler/T_max"], settings["data/length"]) == (0.1, 4, 16)


def test_versions_and_commit_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint of another torch and another commit."""
    run(tmp_path, 1)
    manifest = manifest_of(tmp_path, 1)
    rewrite(
        tmp_path / "checkpoints" / "step_0000001",
        versions={**manifest.versions, "torch": "2.0"},
        settings={**manifest.settings, "git_commit": "a" * 40, "git_is_dirty": True},
    )
    with caplog.at_level("INFO", "trainloop"):
        run(tmp_path, 1)
    assert table_in(caplog.text)["torch"] == ["2.0", torch.__version__, torch.__version__]
    assert table_in(caplog.text)["git_commit"][0] == "a" * 40 or len(table_in(caplog.text)["git_commit"][0]) == 40


def test_a_checkpoint_without_settings_still_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As version 0.1 wrote them: no table, no complaint; and the script may win."""
    run(tmp_path, 2, lr_scheduler_=cosine(4))
    rewrite(tmp_path / "checkpoints" / "step_0000002", settings={})
    rates: dict[int, float] = {}
    with caplog.at_level("INFO", "trainloop"):
        run(tmp_path, 4, optimizer_=adamw(lr=0.2), lr_scheduler_=cosine(4), on_resume="hyperparameters", rates=rates)
    assert table_in(caplog.text) == {}
    assert rates[3] == pytest.approx(0.1)  # cosine(4) on 0.2


def test_functions_of_a_schedule_are_compared_by_their_constants() -> None:
    """Torch stores none of them, so the script's is in force; a partial of transformers' shows its numbers."""

    def warm_up(step: int, *, num_warmup_steps: int) -> float:
        return step / num_warmup_steps

    def scaled(factor: float) -> Callable[[int], float]:
        return lambda step: factor * step

    assert "num_warmup_steps=7" in describe_function(partial(warm_up, num_warmup_steps=7))
    assert describe_function(scaled(2.0)) != describe_function(scaled(3.0))
    assert describe_function(scaled(2.0)) == describe_function(scaled(2.0))
    assert "0x" not in describe_function(scaled(2.0)) + describe_function(partial(warm_up, num_warmup_steps=7))


# ---------------------------------------------------------------------- another class


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("optimizer", {"optimizer_": lambda self: torch.optim.Adam(self.model.parameters())}, {"optimizer_": adamw()}),
        (
            "lr_scheduler",
            {"lr_scheduler_": cosine(9)},
            {"lr_scheduler_": lambda self: schedules.LinearLR(self.optimizer)},
        ),
        ("lr_scheduler", {"lr_scheduler_": cosine(9)}, {}),
        ("lr_scheduler", {}, {"lr_scheduler_": cosine(9)}),
    ],
)
def test_another_class_is_an_error_unless_the_script_wins(tmp_path: Path, name: str, before: Any, after: Any) -> None:
    """Adam, then AdamW: Adam's state must not go on under another rule, nor the checkpoint's group values."""
    run(tmp_path, 2, **before)
    with pytest.raises(ValueError, match=rf'`build_{name}` returns .* was saved with .*on_resume=\["{name}"\]'):
        run(tmp_path, 4, **after)
    trainer = run(tmp_path, 4, on_resume=[name], **after)
    assert trainer.step == 4
    if name == "optimizer":
        assert type(trainer._raw_optimizer) is torch.optim.AdamW
        assert trainer.optimizer.param_groups[0]["lr"] == 0.1
        assert next(iter(trainer._raw_optimizer.state.values()))["step"] == 2  # begun anew at step 2


@pytest.mark.parametrize("value", ["lr", ["data", "optimiser"], [1]])
def test_a_name_that_is_none_is_refused(value: Any) -> None:
    """At construction, with the names that there are."""
    with pytest.raises(ValueError, match=r"`on_resume` must be names out of .*'hyperparameters'.*but one is"):
        CheckpointingHook(1, on_resume=value)
    with pytest.raises(TypeError, match="`on_resume` must be names"):
        CheckpointingHook(1, on_resume=3)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what the script wins


def test_the_script_wins_its_learning_rate_and_weight_decay(tmp_path: Path) -> None:
    """Without a schedule, from the first resumed step on; and the optimizer's state goes on."""
    run(tmp_path, 2)
    rates: dict[int, float] = {}
    given = {"optimizer_": adamw(lr=0.02, weight_decay=0.5)}
    trainer = run(tmp_path, 4, on_resume=["hyperparameters"], rates=rates, **given)
    assert rates == {3: 0.02, 4: 0.02}
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert next(iter(trainer._raw_optimizer.state.values()))["step"] == 4


MADE: dict[str, Callable[[float, int], Callable[[Any], Any]]] = {
    "cosine": lambda scale, length: cosine(length, eta_min=0.001),
    "sequential": lambda scale, length: (
        lambda self: schedules.SequentialLR(
            self.optimizer,
            [
                schedules.LinearLR(self.optimizer, 0.1, total_iters=3),
                schedules.CosineAnnealingLR(self.optimizer, length),
            ],
            [3],
        )
    ),
    "one cycle": lambda scale, length: lambda self: schedules.OneCycleLR(self.optimizer, scale, total_steps=length),
    "lambda": lambda scale, length: lambda self: schedules.LambdaLR(self.optimizer, lambda step: 1 - step / length),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(("scale", "length"), [(0.3, 10), (0.1, 20), (0.3, 20)])
def test_the_script_wins_its_schedule(tmp_path: Path, kind: str, scale: float, length: int) -> None:
    """Another learning rate, a longer schedule, or both: from the resumed step on the rates are those of a run that had
    them from its start.
    """
    make = MADE[kind]
    old = {"optimizer_": adamw(lr=0.1), "lr_scheduler_": make(0.1, 10)}
    new = {"optimizer_": adamw(lr=scale), "lr_scheduler_": make(scale, length)}
    whole: dict[int, float] = {}
    run(tmp_path / "whole", 9, rates=whole, **new)
    rates: dict[int, float] = {}
    run(tmp_path / "a", 5, **old)
    run(tmp_path / "a", 7, on_resume=["hyperparameters", "lr_scheduler"], rates=rates, **new)
    run(tmp_path / "a", 9, on_resume=["hyperparameters", "lr_scheduler"], rates=rates, **new)
    assert rates == {step: whole[step] for step in (6, 7, 8, 9)}


def test_half_of_a_schedule_is_not_taken(tmp_path: Path) -> None:
    """Learning rate and length both differ, and only one is named: an error, since one is built on the other."""
    run(tmp_path, 2, lr_scheduler_=cosine(10))
    for name in ("hyperparameters", "lr_scheduler"):
        with pytest.raises(ValueError, match=r"optimizer/0/lr.*lr_scheduler/T_max.*Put both"):
            run(tmp_path, 4, optimizer_=adamw(lr=0.3), lr_scheduler_=cosine(20), on_resume=[name])
    with pytest.raises(ValueError, match=r'`on_resume` has "lr_scheduler", but.*optimizer/0/lr'):
        run(tmp_path, 4, optimizer_=adamw(lr=0.3), lr_scheduler_=cosine(10), on_resume=["lr_scheduler"])


def seen(folder: Path, max_steps: int, ids: list[int], **kwargs: Any) -> None:
    def forward(self: BaseTrainer, batch: Any) -> Any:
        ids.extend((batch[0][:, 0] * 8).round().int().tolist())
        return self.model(batch[0]).pow(2).mean(), {}

    run(folder, max_steps, forward_=forward, **kwargs)


def test_the_script_wins_its_data_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New data begins at its first epoch. The same command, killed and started again, goes on where it stood."""
    ids: list[int] = []
    seen(tmp_path, 3, ids)
    assert ids == [0, 1, 2, 3, 4, 5]
    ids.clear()
    for max_steps in (5, 7):
        seen(tmp_path, max_steps, ids, data_loader=data(16), on_resume="data")
    assert ids == list(range(8))
    ids.clear()
    seen(tmp_path, 8, ids, data_loader=data(6), on_resume="data")  # other data again
    assert ids == [0, 1]
    ids.clear()
    seen(tmp_path / "fresh", 2, ids, on_resume="data")  # there from the run's first start: nothing to win
    seen(tmp_path / "fresh", 4, ids, on_resume="data")
    assert ids == list(range(8))


def test_data_of_another_kind_needs_the_script_to_win(tmp_path: Path) -> None:
    """The position in a data set says nothing about a stream."""
    run(tmp_path, 2)
    stream = {"data_loader": lambda self: iter([[torch.ones(2, 3)]] * 9)}
    with pytest.raises(ValueError, match=r'on_resume=\["data"\]'):
        run(tmp_path, 4, **stream)
    assert run(tmp_path, 4, on_resume=["data"], **stream).step == 4


# ---------------------------------------------------------------------- a run that has ended


class Stop(BaseHook):
    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 2:
            trainer.request_stop()


def stopped(folder: Path, max_steps: int = 9, **kwargs: Any) -> SmallTrainer:
    hooks = [Stop(), CheckpointingHook(100, **kwargs)]
    trainer = SmallTrainer(max_steps, workspace=folder, hooks_=lambda self: hooks)
    trainer.train()
    return trainer


def test_a_run_that_was_stopped_stays_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same command does no step and says who stopped it, until `max_steps` is raised or `on_resume` has "stop"."""
    assert stopped(tmp_path).step == 3
    assert manifest_of(tmp_path, 3).stopped_by == "Stop.on_after_step"
    with caplog.at_level("INFO", "trainloop"):
        assert stopped(tmp_path).step == 3
    assert "The run was stopped after step 3 by Stop.on_after_step, so it ends here. To continue, raise" in caplog.text
    assert stopped(tmp_path, 10).step == 10
    assert manifest_of(tmp_path, 10).stopped_by == ""
    stopped(tmp_path / "b")
    assert stopped(tmp_path / "b", on_resume=["stop"]).step == 9
    stopped(tmp_path / "c")
    branch = stopped(tmp_path / "d", load=tmp_path / "c" / "checkpoints" / "step_0000003")
    assert branch.step == 9  # begun elsewhere on purpose


def test_a_reason_is_recorded(tmp_path: Path) -> None:
    """`request_stop("…")` says why."""
    trainer = SmallTrainer(5, workspace=tmp_path, hooks_=lambda self: [CheckpointingHook(100)])
    trainer.request_stop("the budget is spent")
    trainer.train()
    assert manifest_of(tmp_path, 1).stopped_by == "the budget is spent"


def test_a_stop_on_one_rank_is_recorded_and_honoured_by_all(tmp_path: Path) -> None:
    """Two processes, rank 1 asks: the second life of the run does no step on either."""
    make = partial(make_trainer, data="stop on rank 1")
    assert live(make, tmp_path / "run", None, num_processes=2) == [0, 0]
    assert manifest_of(tmp_path / "run", 6).stopped_by == "StopOnRankOne.on_after_step"
    assert live(make, tmp_path / "run", None, num_processes=2) == [0, 0]
    for rank in (0, 1):
        assert [row for row in read_notes(path_prefix(tmp_path / "run", 2, rank)) if "step" in row] == []
    log = Path(f"{path_prefix(tmp_path / 'run', 2, 0)}.log").read_text()
    assert "The run was stopped after step 6 by StopOnRankOne.on_after_step" in log


def test_a_finished_run_says_that_it_is_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Started again, and in the same process."""
    trainer = run(tmp_path, 2)
    with caplog.at_level("INFO", "trainloop"):
        run(tmp_path, 2)
        trainer.train()
    told = "The run is complete: it has reached step 2, and `max_steps` is 2. To continue, raise `max_steps`."
    assert caplog.text.count(told) == 2


def test_a_schedule_that_ends_before_the_run_is_told_at_the_resume(tmp_path: Path) -> None:
    """OneCycle with `max_steps` raised: told before the first step, with the remedy, which works. A new run that could
    never reach `max_steps` is refused as well.
    """

    def one_cycle(length: int) -> Any:
        return lambda self: schedules.OneCycleLR(self.optimizer, 0.1, total_steps=length)

    run(tmp_path, 4, lr_scheduler_=one_cycle(4))
    wanted = r"`max_steps` is 8, but OneCycleLR ends at step 4.*on_resume=\[\"lr_scheduler\"\]"
    with pytest.raises(ValueError, match=wanted):
        run(tmp_path, 8, lr_scheduler_=one_cycle(8))
    assert run(tmp_path, 8, lr_scheduler_=one_cycle(8), on_resume=["lr_scheduler"]).step == 8
    with pytest.raises(ValueError, match="`max_steps` is 8, but OneCycleLR ends at step 4"):
        run(tmp_path / "fresh", 8, lr_scheduler_=one_cycle(4))


def test_settings_are_plain_json(tmp_path: Path) -> None:
    """Also what JSON has no word for: tensors and infinities of a group."""
    optimizer = adamw(lr=torch.tensor(0.1), capturable=False, foreach=False)
    run(tmp_path, 1, optimizer_=optimizer)
    assert manifest_of(tmp_path, 1).settings["optimizer/0/lr"] == pytest.approx(0.1)
    text = (tmp_path / "checkpoints" / "step_0000001" / "manifest.json").read_text()
    assert math.isclose(json.loads(text)["settings"]["optimizer/0/lr"], 0.1, rel_tol=1e-6)
