"""Averages on shards and evaluation at any number of processes: the numbers are those of one process, nothing else is
touched.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import (
    BaseHook,
    BaseTrainer,
    CheckpointingHook,
    EarlyStoppingHook,
    EvaluationHook,
    LoggingHook,
    Trainer,
)
from trainloop.checkpoint import BestK, Checkpoint

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer
from .workers import evaluation as worker

WORKER = REPOSITORY / "tests" / "workers" / "evaluation.py"
FORMS = ["single", "ddp2", "fsdp2", "ddp3"]
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each form left what it found."""
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What each rank of each form found; the last launch loads what all forms before it have saved."""
    read = {}
    for name in [*FORMS, "single_again"]:
        form = name.removesuffix("_again")
        # Not resharded after the forward pass: what stays gathered may be used after the shards have changed.
        options = ["--fsdp_reshard_after_forward", "false"] if "fsdp" in form else []
        launch(WORKER, form, str(folder), name, launch_args=options)
        read[name] = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(NUM_PROCESSES[form])]
    return read


def on_every_rank(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{name}, rank {rank}", own) for name, ranks in results.items() for rank, own in enumerate(ranks)]


def test_the_process_groups_end_before_the_interpreter(results: Results, folder: Path) -> None:
    """A thread of gloo's that outlives the interpreter's end aborts a process whose run has succeeded, now and then.
    Of those of the host group none is left at the end, also where the script has ended the groups itself (`ddp3`).
    """
    for name in results:
        for rank in range(NUM_PROCESSES[name.removesuffix("_again")]):
            are_seen = sys.platform == "linux" and not name.startswith("single")  # elsewhere none can be counted
            found = json.loads((folder / f"{name}.{rank}.exit").read_text())
            assert found == [are_seen, False, 0], f"{name}, rank {rank}"


def test_every_sample_counts_once_at_any_number_of_processes(results: Results) -> None:
    """27 samples in batches of 4, on 1, 2 and 3 processes, under DDP and FSDP2: from map-style data (with and without
    workers and random transforms), iterable data sets, lists, mappings, prepared loaders, a single batch for all ranks;
    with noise in `eval_forward`, weights, sums, maxima, and torchmetrics' objects.
    """
    reference = results["single"][0]["evaluations"]
    numbers = range(worker.NUM_SAMPLES)
    for name, found in reference.items():
        parts = found.values() if name == "mapping" else [found]
        for part, num in zip(parts, [3 if name == "one_batch" else len(numbers), 3], strict=False):
            assert part["count"] == num, name
            squares = {"sum": sum(numbers[:num]), "squares": sum(n * n for n in numbers[:num]), "largest": num - 1}
            assert part["numbers"] == squares, name
            assert part["metrics"]["largest"] == num - 1, name
            if name != "weighted":
                assert math.isclose(part["metrics"]["mse"], part["loss"], rel_tol=1e-6), name
    for where, own in on_every_rank(results):
        for name, found in own["evaluations"].items():
            wanted = reference[name]
            parts = zip(found.values(), wanted.values(), strict=True) if name == "mapping" else [(found, wanted)]
            for part, wanted_part in parts:
                assert part["numbers"] == wanted_part["numbers"], f"{name}: {where}"
                for key in ("count", "x", "loss"):
                    assert math.isclose(part[key], wanted_part[key], abs_tol=1e-7), f"{key} of {name}: {where}"
                for key, value in part["metrics"].items():
                    assert math.isclose(value, wanted_part["metrics"][key], abs_tol=1e-6), f"{key} of {name}: {where}"


def test_the_numbers_are_those_of_a_plain_loop() -> None:
    """The mean over all samples, weighted and not, as written out here."""
    trainer = worker.make()
    found = trainer.evaluate()
    model = trainer.model.eval()
    stack = worker.samples(worker.NUM_SAMPLES)
    errors = (model(stack[:, :1]) - 1).pow(2)[:, 0].double()
    assert math.isclose(found["loss"], errors.mean().item(), rel_tol=1e-7)
    assert math.isclose(found["x"], stack[:, 0].double().mean().item(), rel_tol=1e-6)
    trainer.is_weighted = True
    weights = stack[:, 2].double()
    weighted = (errors * weights).sum() / weights.sum()
    assert math.isclose(trainer.evaluate()["loss"], weighted.item(), rel_tol=1e-6)


def test_training_goes_on_as_if_there_were_no_evaluation(results: Results) -> None:
    """Evaluating after each step, with raw and averaged weights: weights, BatchNorm, optimizer, random generators, data
    position and averages are the same bit for bit.
    """
    assert {where: own["untouched"] for where, own in on_every_rank(results) if own["untouched"]} == {}


def test_the_average_of_shards_is_that_of_the_whole_weights(results: Results) -> None:
    """Gathered, it equals the average of the gathered weights bit for bit; frozen parameters are the model's, and it
    has every name of the model's state.
    """
    for where, own in on_every_rank(results):
        assert own["averages"]["names"], where
        assert own["averages"]["reference"] == [], where
        assert own["averages"]["frozen"] == [], where


def test_swapped_is_exact_both_ways(results: Results) -> None:
    """Inside, the model has the averaged weights and computes with them, also what FSDP2 had gathered before; after an
    exception every bit is as it was.
    """
    for where, own in on_every_rank(results):
        assert own["averages"]["changed"], where
        assert own["averages"]["inside"] == [], where
        assert own["averages"]["after"] == [], where


def test_ema_model_is_the_model_with_averaged_weights(results: Results) -> None:
    """It computes what the model computes inside `swapped`; under FSDP2 the error names the two ways that there are."""
    for where, own in on_every_rank(results):
        if "fsdp" in where:
            assert "`with hook.swapped(trainer)`" in own["averages"]["ema_model"], where
            assert "checkpoints export DIR --group ema" in own["averages"]["ema_model"], where
        else:
            assert own["averages"]["ema_model"] == [], where


def test_an_average_is_loaded_into_every_other_form(results: Results) -> None:
    """Saved by 1, 2 and 3 processes under DDP and FSDP2, loaded by each that was launched later: bit for bit."""
    saved = {name: ranks[0]["averages"] for name, ranks in results.items()}
    num_loaded = 0
    for where, own in on_every_rank(results):
        for name, found in own["loaded"].items():
            num_loaded += 1
            for key, wanted in (("ema", saved[name]["average"]), ("slow", saved[name]["slow"])):
                of_weights = [n for n in wanted if "running" not in n]  # BatchNorm's statistics are each rank's own
                assert {n: found[key][n] for n in of_weights} == {n: wanted[n] for n in of_weights}, (
                    f"{name} in {where}"
                )
            assert found["num_updates"] == [5, 2], f"{name} in {where}"
    assert num_loaded == 0 + 2 * 1 + 2 * 2 + 3 * 3 + 4


def test_a_checkpoint_has_the_buffers_of_rank_zero(results: Results, folder: Path) -> None:
    """BatchNorm's statistics differ between the ranks; `model/` and `ema/` have those that evaluation computes with,
    and not some of one rank and some of another.
    """
    for form in FORMS:
        buffers = [own["averages"]["buffers"] for own in results[form]]
        if len(buffers) > 1:
            assert buffers[0]["1.running_mean"] != buffers[1]["1.running_mean"]
        checkpoint = Checkpoint.open(folder / f"checkpoints_{form}" / f"step_{worker.STEPS:07d}")
        for group in ("model", "ema", "slow"):
            found = {
                name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(group).items()
            }
            checkpoint.read_into(group, found)
            assert {name: found[name].tolist() for name in buffers[0]} == buffers[0], f"{group} of {form}"


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize("form", ["single", "ddp2"])
def test_a_signal_ends_an_evaluation_and_the_resumed_run_makes_up_for_it(
    results: Results, folder: Path, form: str
) -> None:
    """SIGTERM to one rank in mid-evaluation: every rank saves and exits with 143 at once; the next life evaluates what
    was left out at its first step, with the result of a run that got no signal.
    """
    cut = f"cut_{form}"
    first = launch(WORKER, form, str(folder), cut, "signal", check=False)
    assert first.returncode != 0
    assert "a signal ended the evaluation" in first.stdout
    launch(WORKER, form, str(folder), cut, "signal")
    for rank in range(NUM_PROCESSES[form]):
        logs = [folder / name / f"{rank}.jsonl" for name in (f"uninterrupted_{form}", cut)]
        (at_2, at_4, end), resumed = ([json.loads(row) for row in log.read_text().splitlines()] for log in logs)
        assert [at_2[0], at_4[0], end] == [2, 4, ["end", 5]]
        assert resumed == [at_2, ["exit", 4, 143], [5, at_4[1]], end]


# ---------------------------------------------------------------------- one process


class Logged(BaseHook):
    """Everything that is logged, with its step."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self.rows.append((trainer.step, records))


def evaluation_data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(15.0).reshape(5, 3) / 15), batch_size=2)


def test_evaluation_comes_when_it_is_asked_for() -> None:
    """At the start (as step 0), at intervals and at the end, once each; wherever the hook stands."""

    def steps(max_steps: int = 5, at: int = 0, **kwargs: Any) -> list[int]:
        log = Logged()
        hooks: list[BaseHook] = [log]
        hooks.insert(at, EvaluationHook(2, data_loader=evaluation_data(), **kwargs))
        SmallTrainer(max_steps, hooks_=lambda self: hooks).train()
        assert all(set(records) == {"val"} for _, records in log.rows)
        return [step for step, _ in log.rows]

    assert steps() == steps(at=1) == [2, 4, 5]
    assert steps(at_start=True) == steps(at_start=True, at=1) == [0, 2, 4, 5]
    assert steps(at_end=False) == [2, 4]
    assert steps(max_steps=4) == [2, 4]


def test_the_ranks_agree_on_an_exit_beside_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """They start to ask before a batch is evaluated, and hear the answer after it. A signal that comes in between is
    heard of in the next round.
    """
    events: list[str] = []
    trainer = SmallTrainer(1, hooks_=lambda self: [EvaluationHook(1, data_loader=evaluation_data())])
    start = trainer.control.start_agreeing_on_exit

    def started() -> Any:
        events.append("ask")
        agreed = start()
        return lambda: (events.append("hear"), agreed())[1]

    def forward(batch: Any) -> Any:
        events.append("forward")
        trainer.control.ask("exit_signal", 15)
        return None, {}

    monkeypatch.setattr(trainer.control, "start_agreeing_on_exit", started)
    monkeypatch.setattr(trainer, "eval_forward", forward)
    trainer.train()
    assert events == ["ask", "forward", "hear"] * 2


def test_ready_made_objects_are_evaluated_too() -> None:
    """`Trainer(eval_data_loader=, eval_forward=)`; without the latter it is `forward`."""
    model = nn.Linear(3, 1)
    given: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": evaluation_data(),
        "forward": lambda model, batch: (model(batch[0]).mean(), {}),
        "eval_data_loader": evaluation_data(),
        "max_steps": 1,
    }
    plain = Trainer(**given).evaluate()
    assert math.isclose(plain["loss"], model(evaluation_data().dataset.tensors[0]).mean().item(), rel_tol=1e-6)
    assert Trainer(**given, eval_forward=lambda model, batch: (None, {"n": 2})).evaluate() == {"n": 2.0}


def test_the_metrics_of_a_step_go_into_its_checkpoint(tmp_path: Path) -> None:
    """Evaluated every step, saved every second: each checkpoint has the numbers of its own step, and `BestK` keeps the
    best. Saved at other steps, one has the numbers of the last evaluation since the commit before, or none.
    """
    losses = {1: 5.0, 2: 3.0, 3: 1.0, 4: 2.0, 5: 9.0, 6: 4.0, 7: 8.0, 8: 7.0}

    def run(folder: Path, interval: int, save: int, order: int, **keep: int) -> dict[int, Any]:
        trainer = SmallTrainer(8, workspace=folder)
        trainer.eval_forward = lambda batch: (None, {"loss": losses[trainer.step]})  # type: ignore[method-assign]
        hooks: list[BaseHook] = [
            EvaluationHook(interval, data_loader=evaluation_data()),
            CheckpointingHook(save, keep=[BestK("val/loss", 2)], **keep),
        ]
        trainer.given["hooks_"] = lambda self: hooks[::order]
        trainer.train()
        folders = sorted((folder / "checkpoints").glob("step_*"))
        return {int(path.name[5:]): Checkpoint.open(path).manifest.metrics for path in folders}

    same = {2: {"val/loss": 3.0}, 4: {"val/loss": 2.0}, 8: {"val/loss": 7.0}}
    assert run(tmp_path / "a", 1, 2, 1) == run(tmp_path / "b", 1, 2, -1) == same
    assert run(tmp_path / "c", 3, 2, 1) == {4: {"val/loss": 1.0}, 6: {"val/loss": 4.0}, 8: {"val/loss": 7.0}}
    every = {step: {"val/loss": losses[step]} if step % 4 == 0 else {} for step in range(1, 9)}
    assert run(tmp_path / "d", 4, 1, 1, keep_previous=7) == every


def test_early_stopping_ends_the_run_and_survives_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stops `patience` values after the best one, NaN and gains below `min_delta` included; killed on the way, the
    resumed run stops at the same step. The log names the step that is the last one.
    """
    losses = [5.0, 4.0, 3.95, math.nan, 3.92, 3.8, 3.7, 3.6]

    def run(folder: Path, max_steps: int) -> SmallTrainer:
        trainer = SmallTrainer(max_steps, workspace=folder)
        trainer.eval_forward = lambda batch: (None, {"loss": losses[trainer.step - 1]})  # type: ignore[method-assign]
        trainer.given["hooks_"] = lambda self: [
            EarlyStoppingHook("val/loss", patience=3, min_delta=0.1),
            CheckpointingHook(1),
            EvaluationHook(1, data_loader=evaluation_data(), at_end=False),
        ]
        trainer.train()
        return trainer

    with caplog.at_level("INFO", "trainloop"):
        assert run(tmp_path / "whole", 8).step == 6  # asked for after step 5, agreed on with step 6
    assert "no better than 4, so the run ends with step 6." in caplog.text
    assert run(tmp_path / "cut", 3).step == 3
    assert run(tmp_path / "cut", 8).step == 6


def test_early_stopping_says_when_its_metric_never_came(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt metric would be a run that never stops: the warning lists what there was."""
    hooks = [EarlyStoppingHook("val/los"), EvaluationHook(1, data_loader=evaluation_data())]
    with caplog.at_level("WARNING", "trainloop"):
        SmallTrainer(1, hooks_=lambda self: hooks).train()
    told = "Step 1: EarlyStoppingHook found no metric 'val/los', so it cannot stop the run. Logged so far: val/loss."
    assert caplog.text.count(told) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_wrong_name_of_a_metric_is_told_at_once_and_costs_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, order: int
) -> None:
    """`val_loss` for `val/loss`: warned of with the first evaluation and the first commit after it, with the right name
    in the list; once; every checkpoint stays. With the right name nothing is said, and the best ones stay.
    """

    def run(folder: Path, metric: str) -> list[str]:
        hooks: list[BaseHook] = [
            CheckpointingHook(1, keep=[BestK(metric)]),
            EarlyStoppingHook(metric, patience=100),
            EvaluationHook(2, data_loader=evaluation_data()),
            LoggingHook(1),
        ]
        caplog.clear()
        with caplog.at_level("WARNING", "trainloop"):
            SmallTrainer(5, workspace=folder, hooks_=lambda self: hooks[::order]).train()
        return sorted(path.name[-1] for path in (folder / "checkpoints").glob("step_*"))

    assert run(tmp_path / "wrong", "val_loss") == list("12345")
    told = [line for line in caplog.messages if "val_loss" in line]
    hook, policy = sorted(told, key=lambda line: "BestK" in line)
    assert "Step 2: BestK(metric='val_loss', k=1, mode='min') finds no metric of that name." in policy
    assert "Step 2: EarlyStoppingHook found no metric 'val_loss'" in hook
    assert all("train/loss" in line and "val/loss" in line for line in (policy, hook))
    assert len(run(tmp_path / "right", "val/loss")) <= 2
    assert caplog.messages == []


def test_a_name_that_is_nearly_right_is_told_without_an_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    """As soon as the right one was logged."""
    hooks = [LoggingHook(1), EarlyStoppingHook("train_loss")]
    with caplog.at_level("WARNING", "trainloop"):
        SmallTrainer(3, hooks_=lambda self: hooks).train()
    (told,) = caplog.messages
    assert "Step 1: EarlyStoppingHook found no metric 'train_loss'" in told


def test_reduce_lr_on_plateau_goes_by_the_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The learning rate falls after `patience` evaluations that are no better, in a run that was cut in two as in one
    that was not; the schedule does not move with the updates.
    """
    losses = [5.0, 4.0, 4.5, 4.5, 4.5, 4.5, 4.5, 4.5]

    def run(folder: Path, *lives: int, monitor: str = "val/loss") -> list[float]:
        rates: list[float] = []

        def evaluated(trainer: BaseTrainer, batch: Any) -> Any:
            return None, {"loss": losses[trainer.step - 1]}

        class Rates(BaseHook):
            def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
                rates.append(trainer.optimizer.param_groups[0]["lr"])

        def schedule(self: BaseTrainer) -> Any:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=1)
            return {"scheduler": plateau, "monitor": monitor}

        for max_steps in lives:
            trainer = SmallTrainer(max_steps, workspace=folder, lr_scheduler_=schedule)
            trainer.eval_forward = partial(evaluated, trainer)  # type: ignore[method-assign]
            evaluation = EvaluationHook(1, data_loader=evaluation_data(), at_start=True)
            trainer.given["hooks_"] = lambda self, evaluation=evaluation: [evaluation, Rates(), CheckpointingHook(1)]
            trainer.train()
        return rates

    wanted = [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    assert run(tmp_path / "whole", 8) == wanted
    assert run(tmp_path / "cut", 3, 5, 8) == wanted
    with caplog.at_level("WARNING", "trainloop"):
        assert run(tmp_path / "wrong", 4, monitor="val_loss") == [0.1] * 4
    told = "'val_loss', the schedule's `monitor`, so the learning rate does not change. It logged: val/loss."
    assert caplog.text.count(told) == 1


def test_a_metric_and_a_schedule_that_do_not_fit_are_refused() -> None:
    """Before the first step, with the form that is right."""
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    constant = torch.optim.lr_scheduler.ConstantLR
    for schedule, message in (
        (lambda self: plateau(self.optimizer), "ReduceLROnPlateau without a metric"),
        (lambda self: {"scheduler": constant(self.optimizer), "monitor": "val/loss"}, "ConstantLR with a metric"),
        (lambda self: {"scheduler": plateau(self.optimizer), "interval": "epoch"}, '"monitor": "val/loss"'),
        (lambda self: {"scheduler": plateau(self.optimizer), "monitor": "val/loss"}, "there is no EvaluationHook"),
    ):
        with pytest.raises(ValueError, match=message):
            SmallTrainer(2, lr_scheduler_=schedule).train()


class NotMean:
    """Has two of the three methods of a metric."""

    update = compute = print


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EvaluationHook(0), ValueError, "`interval` must be at least 1, but is 0."),
        (lambda: EvaluationHook(1, ema=0.9), TypeError, "`ema` must be an EmaHook or None, but is 0.9 (float)."),  # type: ignore[arg-type]
        (lambda: EvaluationHook(1, prefix=""), ValueError, "`prefix` must be a name, but is ''."),
        (lambda: EarlyStoppingHook("val/loss", 0), ValueError, "`patience` must be at least 1, but is 0."),
        (lambda: EarlyStoppingHook("a", mode="low"), ValueError, '`mode` must be "min" or "max", but is \'low\'.'),  # type: ignore[arg-type]
        (lambda: EarlyStoppingHook("a", min_delta=-1), ValueError, "`min_delta` must be finite and at least 0"),
        (
            lambda: SmallTrainer(1, hooks_=lambda self: [EvaluationHook(1)]).train(),
            ValueError,
            "EvaluationHook (prefix 'val') has no data: `build_eval_data_loader` returned None.",
        ),
        (
            lambda: SmallTrainer(1, hooks_=lambda self: [EvaluationHook(1, data_loader=[1]) for _ in range(2)]).train(),
            ValueError,
            "The `prefix`es of several EvaluationHooks must differ, but two are 'val'.",
        ),
        (lambda: SmallTrainer(1).evaluate(), ValueError, "`evaluate` has no data"),
        (lambda: SmallTrainer(1).evaluate(5), TypeError, "The evaluation data must be a DataLoader or another"),
        (lambda: SmallTrainer(1).evaluate([]), ValueError, "The evaluation data gave no batch."),
        (
            lambda: SmallTrainer(1).evaluate([["a"]], reduce={"x": "median"}),  # type: ignore[dict-item]
            ValueError,
            "`reduce` must name one of ('mean', 'sum', 'max', 'min') for each record, but has 'median' for 'x'.",
        ),
        (
            lambda: SmallTrainer(1, forward_=lambda self, batch: (None, {})).evaluate([["a"]]),
            ValueError,
            "Let `batch_weight` return the number.",
        ),
        (
            lambda: SmallTrainer(1, forward_=lambda self, batch: (None, {"a": NotMean()})).evaluate(evaluation_data()),
            TypeError,
            'The record "a" must be a number or a 0-dim tensor',
        ),
    ],
)  # fmt: skip
def test_wrong_use_is_an_error_that_names_it(make: Any, error: type[Exception], message: str) -> None:
    """Arguments at construction, the hooks of a run before its first step."""
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_an_average_that_the_run_does_not_have_is_refused() -> None:
    """`ema=` of a hook that nobody returned from `build_hooks` would evaluate the initial weights."""
    from trainloop import EmaHook

    hook = EvaluationHook(1, data_loader=evaluation_data(), ema=EmaHook(0.9))
    with pytest.raises(ValueError, match="must be one of the run's hooks"):
        SmallTrainer(1, hooks_=lambda self: [hook]).train()
