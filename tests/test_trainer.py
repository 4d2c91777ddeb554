"""The life of a run: events in their order, a second `train`, a second trainer, an exception, one host read a step."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import subprocess
import sys
import warnings
from pathlib import Path
from textwrap import dedent
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.host_reads import HostReads
from trainloop import (
    BaseHook,
    BaseTrainer,
    CheckpointingHook,
    CudaMaxMemoryHook,
    EarlyStoppingHook,
    EvaluationHook,
    ImageFileLoggerHook,
    LoggingHook,
    ProgressHook,
    ThroughputHook,
    TrackerHook,
    Trainer,
    TrainingError,
    TrainloopWarning,
)

from .launching import REPOSITORY
from .small import SmallTrainer

EVENTS = [name for name in vars(BaseHook) if name.startswith("on_")]


class Recorder(BaseHook):
    """Writes down every event with the step at which it came."""

    def __init__(self, name: str, events: list[Any]) -> None:
        for event in EVENTS:
            setattr(self, event, lambda trainer, *args, event=event: events.append((name, event, trainer.step)))


def weights(trainer: BaseTrainer) -> list[float]:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()


def test_hooks_hear_every_event_in_list_order() -> None:
    """The whole list of a run of two steps, for two hooks."""
    events: list[Any] = []
    SmallTrainer(hooks_=lambda self: [Recorder("a", events), Recorder("b", events)]).train()
    wanted = [("on_before_train", 0)]
    for step in (1, 2):
        names = ("on_before_step", "on_before_optimizer_step", "on_after_optimizer_step", "on_after_step")
        wanted += [(event, step) for event in names]
    wanted += [("on_after_train", 2)]
    assert events == [(name, event, step) for event, step in wanted for name in ("a", "b")]


def test_log_and_state_reach_every_hook() -> None:
    """`log`, `log_images`, `state_dict` and `load_state_dict` are events too."""
    events: list[Any] = []
    trainer = SmallTrainer(hooks_=lambda self: [Recorder("a", events)])
    trainer.train()
    events.clear()
    trainer.log({"x": 1.0})
    trainer.log_images({"x": None}, dry_run=True)
    trainer.log_histogram({"x": None}, dry_run=True)
    trainer.log_text({"x": None}, dry_run=True)
    trainer.load_state_dict(trainer.state_dict())
    logs = ["on_log", "on_log_images", "on_log_histogram", "on_log_text"]
    assert [event for _, event, _ in events] == [*logs, "on_state_dict", "on_load_state_dict"]


class Shows(BaseHook):
    """A hook that writes numbers somewhere."""

    def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
        pass


class Logs(BaseHook):
    """Logs a number and an image at each step."""

    def on_after_step(self, trainer: Any) -> None:
        trainer.log({"x": 1.0})
        trainer.log_images({"x": torch.zeros(2, 2)})


def warned(*hooks: BaseHook, **kwargs: Any) -> list[str]:
    """The warnings of a run of three steps with these hooks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        type("Evaluated", (SmallTrainer,), kwargs)(3, hooks_=lambda self: list(hooks)).train()
    assert {warning.category for warning in caught} <= {TrainloopWarning}
    return [str(warning.message) for warning in caught]


def test_what_no_hook_writes_is_warned_of_once(tmp_path: Path) -> None:
    """Numbers and images each. A checkpointer doesn't count: it keeps numbers as metrics of a checkpoint only."""
    numbers = (
        "The records given to `trainer.log` are not written anywhere, because no hook defines `on_log`. Return one from"
    )
    images = (
        "The records given to `trainer.log_images` are not written anywhere, because no hook defines `on_log_images`."
    )
    for hooks in ([Logs()], [Logs(), ProgressHook()], [Logs(), CheckpointingHook(100, path=tmp_path / "checkpoints")]):
        told = warned(*hooks)
        assert [text[: len(wanted)] for text, wanted in zip(told, [numbers, images], strict=True)] == [numbers, images]
    assert [text[: len(images)] for text in warned(Logs(), Shows())] == [images]
    assert warned(Logs(), Shows(), ImageFileLoggerHook(path=tmp_path / "images")) == []
    assert [text[: len(numbers)] for text in warned(LoggingHook(1))] == [numbers]


def test_numbers_of_an_evaluation_need_no_hook() -> None:
    """`EvaluationHook` writes them into the log itself."""
    assert warned(EvaluationHook(1), build_eval_data_loader=lambda self: self.build_data_loader()) == []


def test_what_is_logged_before_the_hooks_exist_is_warned_of() -> None:
    """They are built by `train`, so nothing of it could be written."""
    with pytest.warns(TrainloopWarning, match="because the hooks don't exist before `train` begins"):
        SmallTrainer(hooks_=lambda self: [Shows()]).log({"x": 1.0})


@pytest.mark.parametrize("method", ["log", "log_images", "log_histogram", "log_text"])
def test_log_takes_a_mapping(method: str) -> None:
    """Lightning's `log(name, value)` is refused, whoever listens."""
    with pytest.raises(TypeError, match=rf"^`{method}` must be given a mapping, for example .* but was given 'loss'"):
        getattr(SmallTrainer(), method)("loss", 0.5)


def test_a_line_is_written_once_when_logging_is_configured_later() -> None:
    """Before `basicConfig` by a handler of ours, after it by the script's alone."""
    lines = """
        import logging
        from tests.small import SmallTrainer
        trainer = SmallTrainer()
        trainer.logger.info("before")
        logging.basicConfig(format="script: %(message)s")
        trainer.logger.info("after")
        SmallTrainer().logger.info("again")
    """
    done = subprocess.run([sys.executable, "-c", dedent(lines)], cwd=REPOSITORY, capture_output=True, text=True)
    first, *rest = done.stderr.splitlines()
    assert first.endswith(" INFO [RANK 0] before")
    assert rest == ["script: [RANK 0] after", "script: [RANK 0] again"]


def test_training_may_go_on_after_max_steps_was_raised() -> None:
    """Two steps and then three more are five steps: weights and data alike."""
    whole = SmallTrainer(5)
    whole.train()
    parts = SmallTrainer(2)
    parts.train()
    assert parts.step == 2
    parts.max_steps = 5
    parts.train()
    assert parts.step == 5
    assert weights(parts) == weights(whole)
    assert parts.state_dict()["training_state"]["data"] == whole.state_dict()["training_state"]["data"]


def test_the_state_of_one_run_continues_in_another() -> None:
    """`state_dict` into a new trainer, and the rest of the run is the same bit for bit: dropout, OneCycle, shuffle."""

    def make(max_steps: int) -> SmallTrainer:
        return SmallTrainer(
            max_steps,
            gradient_accumulation_steps=3,
            data_loader=lambda self: DataLoader(TensorDataset(torch.arange(33.0).view(11, 3)), 2, shuffle=True),
            model_=lambda self: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)),
            optimizer_=lambda self: torch.optim.AdamW(self.model.parameters(), lr=0.1),
            lr_scheduler_=lambda self: torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=9),
        )

    whole = make(8)
    whole.train()
    first = make(3)
    first.train()
    state = first.state_dict()
    torch.rand(5)
    second = make(8)
    second.load_state_dict(state)
    second.train()
    assert second.step == 8
    assert weights(second) == weights(whole)
    assert second.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


@pytest.mark.parametrize("where", ["forward", "hook", "data"])
def test_an_exception_leaves_nothing_behind(where: str) -> None:
    """Workers end, `on_exception` is called once, the error is the user's, and the next trainer trains as the first
    one of a process does.
    """
    healthy = SmallTrainer(gradient_accumulation_steps=2)
    healthy.train()
    seen: list[BaseException] = []

    class Watch(BaseHook):
        def on_after_step(self, trainer: BaseTrainer) -> None:
            assert multiprocessing.active_children(), "workers run while it trains"
            if where == "hook":
                raise KeyError(where)

        def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
            seen.append(exception)

    class Data(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if where == "data" and index == 7:
                raise KeyError(where)
            return super().__getitem__(index)

    def forward(self: Any, batch: Any) -> Any:
        if where == "forward":
            raise KeyError(where)  # in mid-window, with `sync_gradients` off
        return self.model(batch[0]).mean(), {}

    trainer = SmallTrainer(
        50,
        gradient_accumulation_steps=2,
        hooks_=lambda self: [Watch()],
        forward_=forward,
        data_loader=lambda self: DataLoader(Data(torch.ones(8, 3)), batch_size=2, num_workers=2),
    )
    with pytest.raises(KeyError, match=where) as caught:
        trainer.train()
    assert seen == [caught.value]
    gc.collect()
    assert multiprocessing.active_children() == []
    after = SmallTrainer(gradient_accumulation_steps=2)
    after.train()
    assert weights(after) == weights(healthy)


def test_trainers_of_a_process_do_not_disturb_each_other() -> None:
    """Another accumulation in between changes nothing."""
    alone = SmallTrainer(4, gradient_accumulation_steps=2)
    alone.train()
    first = SmallTrainer(2, gradient_accumulation_steps=2)
    first.train()
    SmallTrainer(3, gradient_accumulation_steps=4).train()
    first.max_steps = 4
    first.train()
    assert weights(first) == weights(alone)


def test_a_stop_ends_the_run_after_the_step_that_agreed_on_it() -> None:
    """Asked for after step 2, agreed on in step 3; a later `train` goes on."""

    class Stop(BaseHook):
        def on_after_step(self, trainer: BaseTrainer) -> None:
            if trainer.step == 2:
                trainer.request_stop()

    trainer = SmallTrainer(9, hooks_=lambda self: [Stop()])
    trainer.train()
    assert trainer.step == 3
    trainer.train()
    assert trainer.step == 9


def test_ready_made_objects_train_as_a_subclass_does() -> None:
    """`Trainer` with what a script has, prepared by Accelerate, in part or not at all, gives the subclass's weights,
    and trains the very objects that it was given.
    """
    reference = SmallTrainer(5, lr_scheduler_=lambda self: torch.optim.lr_scheduler.StepLR(self.optimizer, 2))
    reference.train()
    for prepared in [
        "",
        "model optimizer loader scheduler",
        "model optimizer",
        "loader",
        "scheduler",
        "model",
        "optimizer",
    ]:
        accelerator = accelerate.Accelerator(cpu=True)
        accelerate.utils.set_seed(0)
        loader: Any = DataLoader(TensorDataset(torch.arange(24.0).reshape(8, 3) / 24), batch_size=2)
        model: Any = nn.Linear(3, 1)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        given = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
        for name in prepared.split():
            given[name] = accelerator.prepare(given[name])
        trainer = Trainer(
            model=given["model"],
            optimizer=given["optimizer"],
            data_loader=given["loader"],
            lr_scheduler=given["scheduler"],
            forward=lambda model, batch: (model(batch[0]).pow(2).mean(), {}),
            accelerator=accelerator,
            max_steps=5,
            seed=0,
        )
        trainer.train()
        assert weights(trainer) == weights(reference)
        assert trainer.unwrapped_model is model
        assert trainer.lr_scheduler is scheduler
        assert trainer.optimizer.param_groups[0]["lr"] == reference.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("num_micro", [1, 4])
@pytest.mark.parametrize("grad_clip", [None, 0.01])
def test_one_host_read_a_step(num_micro: int, grad_clip: float | None) -> None:
    """Whatever the accumulation, with records, BatchNorm and hooks between their intervals."""

    def host_reads(max_steps: int) -> int:
        trainer = SmallTrainer(
            max_steps,
            gradient_accumulation_steps=num_micro,
            grad_clip=grad_clip,
            model_=lambda self: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
            optimizer_=lambda self: torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9),
            forward_=lambda self, batch: ((loss := self.model(batch[0]).pow(2).mean()), {"loss": loss}),
            hooks_=lambda self: [
                LoggingHook(interval=100),
                ProgressHook(interval=100),
                ThroughputHook(interval=100),
                CudaMaxMemoryHook(),
            ],
        )
        with HostReads() as reads:
            trainer.train()
        return reads.count

    assert host_reads(30) - host_reads(10) == 20


def test_a_compiled_model_keeps_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation through Accelerate's launch configuration trains alike, and names in the state stay clean."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = SmallTrainer(3)
    compiled.train()
    AcceleratorState._reset_state(True)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    plain = SmallTrainer(3)
    plain.train()
    assert not hasattr(plain.model, "_orig_mod")
    assert hasattr(compiled.model, "_orig_mod")
    assert type(compiled.unwrapped_model) is nn.Linear
    assert weights(compiled) == pytest.approx(weights(plain))
    state = compiled.state_dict()
    assert list(state["model"]) == ["weight", "bias"]
    assert state["training_state"]["optimizer"]["param_groups"][0]["params"] == ["weight", "bias"]


def test_the_seed_gives_the_model_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The same seed, the same weights; without one, one is drawn, logged and saved."""
    trainers = [SmallTrainer(0, seed=seed) for seed in (1, 1, 2, None)]
    with caplog.at_level(logging.INFO, "trainloop"):
        for trainer in trainers:
            trainer.train()
    assert weights(trainers[0]) == weights(trainers[1]) != weights(trainers[2])
    drawn = trainers[3].state_dict()["training_state"]["seed"]
    assert f"seed {drawn}," in [line for line in caplog.messages if "seed" in line][-1]


class Keeps(BaseHook):
    """Saves a number under a key that another hook may use as well."""

    def __init__(self, value: float, is_rank: bool) -> None:
        self.value, self.is_rank = value, is_rank

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        (state_dict["rank"] if self.is_rank else state_dict)["mine"] = {"value": self.value}


def test_hooks_that_collide_are_told_before_the_first_step(tmp_path: Path) -> None:
    """Two into one folder, however it is written, or under one name in the saved state; the same hook twice."""
    once = LoggingHook(5)
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    for hooks, message in (
        (
            [CheckpointingHook(1), CheckpointingHook(5)],
            r"both save into .*checkpoints\. .* give it another `path`",
        ),
        ([CheckpointingHook(1), CheckpointingHook(5, path=tmp_path / "link")], "both save into"),
        ([LoggingHook(5), LoggingHook(5, sync=False)], "both report every 5 steps as a LoggingHook"),
        ([ProgressHook(5), ProgressHook(5)], "both report every 5 steps as a ProgressHook"),
        ([ImageFileLoggerHook(), ImageFileLoggerHook()], "both write images into"),
        ([EarlyStoppingHook("a"), EarlyStoppingHook("a", 5)], "both stop the run by 'a'"),
        ([TrackerHook("tensorboard"), TrackerHook("tensorboard")], "both log with tensorboard"),
        ([once, once], "returned the same LoggingHook twice"),
    ):
        with pytest.raises(ValueError, match=message):
            SmallTrainer(2, workspace=tmp_path, hooks_=lambda self, hooks=hooks: hooks).train()
    hooks = [CheckpointingHook(1), CheckpointingHook(5, path="others"), LoggingHook(5), LoggingHook(1), ProgressHook(5)]
    with pytest.warns(TrainloopWarning, match="not written anywhere"):
        SmallTrainer(1, workspace=tmp_path, hooks_=lambda self: hooks).train()


@pytest.mark.parametrize("is_rank", [False, True])
def test_a_key_that_two_hooks_save_under_is_refused(is_rank: bool) -> None:
    """One would get the other's state at a resume."""
    trainer = SmallTrainer(1, hooks_=lambda self: [Keeps(1.5, is_rank), Keeps(2.5, is_rank)])
    trainer.train()
    with pytest.raises(ValueError, match=r"Keeps.on_state_dict has overwritten 'mine', which Keeps.on_state_dict had"):
        trainer.state_dict()
    alone = SmallTrainer(1, hooks_=lambda self: [Keeps(1.5, is_rank)])
    alone.train()
    alone.state_dict()


def test_a_window_without_weight_late_in_a_run_is_drawn_anew() -> None:
    """With an accumulation of 2, in the fourth epoch: one such window is no epoch without a loss."""

    class Weighted(SmallTrainer):
        num_dropped = 0

        def batch_weight(self, batch: Any) -> float:
            is_dropped = self.step == 7 and self.num_dropped < 2
            self.num_dropped += is_dropped
            return 0.0 if is_dropped else 1.0

    trainer = Weighted(8, gradient_accumulation_steps=2)
    trainer.train()
    assert (trainer.step, trainer.num_dropped) == (8, 2)


def test_data_without_weight_ends_the_run() -> None:
    """With an accumulation of 2, and in a later step than the first."""

    class Weighted(SmallTrainer):
        def batch_weight(self, batch: Any) -> float:
            return float(self.step < 7)

    trainer = Weighted(8, gradient_accumulation_steps=2)
    with pytest.raises(TrainingError, match="Step 7: no micro-batch of a whole epoch gave a loss"):
        trainer.train()


def test_the_report_names_the_parts_in_eval_mode(caplog: pytest.LogCaptureFixture) -> None:
    """A `from_pretrained` model inside another module trains without dropout, and the log says so."""

    def model(trainer: BaseTrainer) -> nn.Module:
        head = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
        return nn.Sequential(nn.Sequential(head, nn.Dropout()).eval(), nn.Linear(3, 1))

    with caplog.at_level("INFO", "trainloop"):
        SmallTrainer(1, model_=model).train()
        assert ", in eval mode: 0, weights" in caplog.text
        caplog.clear()
        SmallTrainer(1, model_=lambda self: model(self).eval()).train()
    assert "1 process on" in caplog.text
    assert "in eval mode" not in caplog.text
