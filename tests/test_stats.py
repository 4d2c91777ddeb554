"""What is logged: exact means of an interval, over the ranks where asked for, also across a resume."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trainloop import BaseHook, BaseTrainer, LoggingHook, ProgressHook, flatten_nested_dict, key_average
from trainloop.records import map_nested_tensor, unflatten_nested_dict

from .launching import REPOSITORY, launch
from .small import SmallTrainer


class Log(BaseHook):
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self.logged.append(records["train"])


def counting_forward(self: Any, batch: Any) -> Any:
    """The loss of the n-th micro-batch is n; "odd" is recorded for the odd ones only."""
    self.calls = getattr(self, "calls", 0) + 1
    records = {"calls": torch.tensor(self.calls), "nested": {"twice": 2.0 * self.calls}}
    if self.calls % 2:
        records["odd"] = self.calls
    return self.model(batch[0]).sum() * 0 + self.calls, records


def without_times(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in records.items() if not k.endswith("_time")} for records in logged]


def named_groups(self: Any) -> torch.optim.Optimizer:
    groups = [{"params": [self.model.weight], "name": "w"}, {"params": [self.model.bias], "lr": 0.5}]
    return torch.optim.SGD(groups, lr=0.1)


def test_an_interval_is_averaged_over_its_micro_batches() -> None:
    """Means over micro-batches and steps; a record counts where it exists; the learning rate is the one that the
    interval's last step used, by the name of its group.
    """
    log = Log()
    SmallTrainer(
        5,
        gradient_accumulation_steps=2,
        forward_=counting_forward,
        optimizer_=named_groups,
        lr_scheduler_=lambda self: torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5),
        hooks_=lambda self: [LoggingHook(interval=2), log],
    ).train()
    assert [records["step_time"] >= records["data_time"] > 0 for records in log.logged] == [True, True]
    common = {"grad_norm": 0.0, "non_finite_grad_retry_count": 0}
    assert without_times(log.logged) == [
        {"loss": 2.5, "calls": 2.5, "nested": {"twice": 5.0}, "odd": 2.0, "lr": {"w": 0.05, "1": 0.25}, **common},
        {"loss": 6.5, "calls": 6.5, "nested": {"twice": 13.0}, "odd": 6.0, "lr": {"w": 0.0125, "1": 0.0625}, **common},
    ]


def test_records_of_narrow_dtypes_are_averaged_as_numbers() -> None:
    """A bool is 0 or 1, and neither uint8 nor fp16 overflows in the sum over micro-batches."""
    records = {
        "hit": torch.tensor(True),
        "level": torch.tensor(200, dtype=torch.uint8),
        "scale": torch.tensor(60000.0, dtype=torch.float16),
    }
    log = Log()
    SmallTrainer(
        2,
        gradient_accumulation_steps=4,
        forward_=lambda self, batch: (self.model(batch[0]).sum(), records),
        hooks_=lambda self: [LoggingHook(interval=2), log],
    ).train()
    (logged,) = log.logged
    assert (logged["hit"], logged["level"], logged["scale"]) == (1.0, 200.0, 60000.0)


def test_a_resume_within_an_interval_logs_the_whole_interval() -> None:
    """As a run that was never stopped."""

    def make(max_steps: int) -> tuple[SmallTrainer, Log]:
        log = Log()
        return SmallTrainer(max_steps, hooks_=lambda self: [LoggingHook(interval=4), log]), log

    whole, whole_log = make(8)
    whole.train()
    first, _ = make(6)
    first.train()
    second, log = make(8)
    second.load_state_dict(first.state_dict())
    second.train()
    assert without_times(log.logged) == without_times(whole_log.logged[1:])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    launch(REPOSITORY / "tests" / "workers" / "stats.py", "ddp2", str(folder))
    return folder


def test_records_of_some_ranks_only_are_averaged_over_those(two_ranks: Path) -> None:
    """With `sync=True`, at 2 processes; every rank gets the same means."""
    by_rank = [json.loads((two_ranks / f"{rank}.json").read_text()) for rank in range(2)]
    assert by_rank[0] == by_rank[1] == [{"rank": 0.5, "only_1": 7.0, "loss": 2.5}]


def test_the_slowest_rank_is_named(two_ranks: Path) -> None:
    """`ThroughputHook` at 2 processes: rank 1 sleeps in `forward`, and DDP has rank 0 wait for it. Samples are those of
    both; every rank gets the same.
    """
    by_rank = [json.loads((two_ranks / f"throughput_{rank}.json").read_text()) for rank in range(2)]
    assert by_rank[0] == by_rank[1]
    (measured,) = by_rank[0]
    assert measured["slowest_rank"] == 1
    assert 1.2 < measured["slowest_rank_ratio"] < 2
    assert 0 < measured["samples_per_second"] < 2 / 0.05


def test_images_are_written_by_rank_0(two_ranks: Path) -> None:
    """Its own, and of a DTensor the whole."""
    step = two_ranks / "images" / "step_0000003"
    assert sorted(path.name for path in step.parent.rglob("*")) == ["rank.png", "sharded.png", "step_0000003"]
    assert not np.asarray(Image.open(step / "rank.png")).any()
    assert (np.asarray(Image.open(step / "sharded.png")) == [0, 0, 1]).all()


def test_the_line_says_what_one_wants_to_know(caplog: pytest.LogCaptureFixture) -> None:
    """Step, times, remaining time, loss, norm, learning rate by group, retries, memory, records."""

    class Memory(BaseHook):
        def on_after_step(self, trainer: BaseTrainer) -> None:
            trainer.step_info.max_memory = 1.5
            trainer.step_info.non_finite_grad_retry_count = 1

    with caplog.at_level(logging.INFO, "trainloop"):
        SmallTrainer(
            4,
            forward_=counting_forward,
            optimizer_=named_groups,
            hooks_=lambda self: [Memory(), ProgressHook(interval=2, with_records=True, eta_warmup=2)],
        ).train()
    number = r"[\d.e+-]+"
    start = rf"step time {number} s \| data time {number} s \| "
    lines = caplog.messages[1:]  # the first says what the run is
    assert len(lines) == 2
    assert re.fullmatch(
        rf"\[RANK 0\] step 2/4 \| {start}loss 1.5 \| grad norm 0 \| lr w=0.1, 1=0.5 \| retries 2 \| memory 1.5 GiB"
        r" \| calls 1.5 \| nested/twice 3 \| odd 1",
        lines[0],
    )
    assert re.match(rf"\[RANK 0\] step 4/4 \| {start}ETA 0:00:00 \| loss 3.5 \|", lines[1])


def test_the_last_step_has_a_line_and_the_interval_goes_on_after_it(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the interval. If the run is then extended, the line of the interval is that of a run never cut."""

    def losses(*ends: int) -> list[str]:
        caplog.clear()
        trainer = SmallTrainer(ends[0], hooks_=lambda self: [ProgressHook(interval=4)])
        with caplog.at_level("INFO", "trainloop"):
            for trainer.max_steps in ends:
                trainer.train()
        return re.findall(r"step (\d/\d \|).*(loss [\d.]+)", caplog.text)

    whole, cut = losses(5), losses(2, 5)
    assert [step for step, _ in whole] == ["4/5 |", "5/5 |"]
    assert [step for step, _ in cut] == ["2/2 |", "4/5 |", "5/5 |"]
    assert cut[1:] == whole


def test_a_verbose_run_shows_its_model(caplog: pytest.LogCaptureFixture) -> None:
    """A row for each part, one for neighbours that are alike, and the total."""

    def model(self: BaseTrainer) -> nn.Module:
        layers = [nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)]
        layers[0].requires_grad_(False)
        return nn.Sequential(*layers)

    with caplog.at_level("INFO", "trainloop"):
        SmallTrainer(1, model_=model, hooks_=lambda self: [ProgressHook(verbose=True)]).train()
    (table,) = [message for message in caplog.messages if "The model:" in message]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["module", "type", "parameters", "trainable", "a", "rank"],
        ["0", "Linear", "16", "0", "0.1", "KiB"],
        ["1", "…", "2", "Linear", "x", "2", "20", "20", "0.1", "KiB"],
        ["4", "Linear", "5", "5", "0.0", "KiB"],
        ["total", "Sequential", "61", "45", "0.2", "KiB"],
    ]


def test_nested_records() -> None:
    """Flattened by tuples of keys and back; averaged where they exist; tensors are mapped and all else is left."""
    nested = {"a": {"b": 1.0, "c": {"d": 2.0}}, "e": 3.0}
    flat = {("a", "b"): 1.0, ("a", "c", "d"): 2.0, ("e",): 3.0}
    assert flatten_nested_dict(nested) == flat
    assert unflatten_nested_dict(flat) == nested
    assert key_average([{"x": 1, "y": {"z": torch.tensor(4.0)}}, {"x": 2, "l": [1, 2]}, {"y": {"z": 2.0}}]) == {
        "x": 1.5,
        "y": {"z": 3.0},
        "l": {"0": 1, "1": 2},
    }
    assert key_average([]) == {}
    for value, mean in [
        (torch.tensor(True), 1.0),
        (torch.tensor(200, dtype=torch.uint8), 200.0),
        (torch.tensor(60000.0, dtype=torch.float16), 60000.0),
        (torch.tensor(2**40 + 1), 2.0**40 + 1),
        (np.uint8(200), 200.0),
        (np.float16(60000.0), 60000.0),
        (np.bool_(True), 1.0),
    ]:
        assert float(key_average([{"x": value}] * 4)["x"]) == mean, value
    doubled = map_nested_tensor(lambda t: t * 2, {"a": [torch.tensor(1), "s"], "b": (torch.tensor(2), None)})
    assert doubled == {"a": [2, "s"], "b": (4, None)}
    assert map_nested_tensor(torch.Tensor.detach, nn.Parameter(torch.ones(1))).requires_grad is False
