"""Fetching the next batch while the device works changes nothing that a run can observe. The CPU runs it here."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainloop import BaseHook, CheckpointingHook
from trainloop.data import look_ahead
from trainloop.data.feed import DataFeed
from trainloop.data.look_ahead import LookAhead
from trainloop.step.agreement import Agreement
from trainloop.testing.comparison import differences

from .small import SmallTrainer

NUM_SAMPLES, NUM_STEPS = 11, 10
UNREADABLE = NUM_SAMPLES + 1


class Noisy(Dataset):  # type: ignore[type-arg]
    """Sample i: its number and noise."""

    def __init__(self, unreadable: int = UNREADABLE) -> None:
        self.unreadable = unreadable

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.unreadable:
            raise OSError("no such block")
        return torch.stack([torch.tensor(float(index)), torch.rand(()), torch.rand(())])


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Each worker gives samples of its own, with noise."""

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        for i in range(0 if info is None else info.id, NUM_SAMPLES, 1 if info is None else info.num_workers):
            yield torch.stack([torch.tensor(float(i)), torch.rand(()), torch.rand(())])


class StatefulStream(IterableDataset):  # type: ignore[type-arg]
    position = 0

    def __iter__(self) -> Any:
        while self.position < NUM_SAMPLES:
            self.position += 1
            yield torch.full((3,), float(self.position))
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Seen(BaseHook):
    """After each step: where the run stands in its data, and what it draws by chance."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def on_after_step(self, trainer: Any) -> None:
        feed = trainer._feed
        where = [feed.state_dict(), feed.rank_state_dict(), feed.position_checksum(), feed.num_epochs_done]
        noise = torch.rand(()).item()
        self.steps.append([trainer.step, trainer.epoch, *where, trainer.step_info.grad_norm, noise])


class MoreMicroBatches(BaseHook):
    def on_before_step(self, trainer: Any) -> None:
        trainer.gradient_accumulation_steps = 3 if trainer.step in (3, 4, 8) else 1


class Rewinding(BaseHook):
    """Puts the state of step 2 back after step 4, once."""

    state: Any = None
    is_done = False

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == 2 and not self.is_done:
            self.state = trainer.state_dict()
        if trainer.step == 4 and not self.is_done:
            self.is_done = True
            trainer.load_state_dict(self.state)


class Interrupted(BaseHook):
    """Once, when the batch of step 5 has been fetched."""

    is_done = False

    def on_before_step(self, trainer: Any) -> None:
        if trainer.step == 5 and not self.is_done:
            self.is_done = True
            raise KeyboardInterrupt


class Killed(BaseHook):
    def on_before_step(self, trainer: Any) -> None:
        if trainer.step == 7:
            raise SystemExit


class Trainer(SmallTrainer):
    waits_at: Any = ()
    bad: Any = ()

    def forward(self, batch: Any) -> Any:
        self.ids.append([int(i) for i in batch[:, 0]])
        if self.step in self.waits_at:  # until the workers have the next batch, so that it can be fetched ahead
            begin = time.monotonic()
            while not self._feed._source.has_ready_batch():
                assert time.monotonic() - begin < 60, "the workers give nothing"
                time.sleep(0.002)
        if self.ids[-1][0] in self.bad:
            return (self.model(batch).sum() * float("nan")) if self.ids[-1][0] % 2 else None, {}
        return self.model(batch + 0.1 * torch.rand_like(batch)).pow(2).mean(), {}


def map_style(num_workers: int = 2, **kwargs: Any) -> Any:
    return DataLoader(Noisy(**kwargs), batch_size=2, shuffle=True, num_workers=num_workers)


def stream(dataset: Any, num_workers: int = 2) -> Any:
    return DataLoader(dataset, batch_size=2, num_workers=num_workers)


EVERY_STEP, IN_THE_FIRST_EPOCH = range(NUM_STEPS), (1, 2)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "map-style, another accumulation": (map_style, {"hook": MoreMicroBatches}),
    "map-style, retries and skipped micro-batches": (map_style, {"bad": (3, 4)}),
    "map-style, in two trains": (map_style, {"hook": Interrupted}),
    "map-style, rewound": (map_style, {"hook": Rewinding}),
    "map-style, unreadable": (lambda: map_style(unreadable=7), {}),
    "map-style, no workers": (lambda: map_style(0), {"is_fetched": False}),
    "stream, in two trains": (lambda: stream(Stream()), {"waits_at": (1, 2, 4), "hook": Interrupted}),
    "stream with a state": (lambda: stream(StatefulStream()), {"waits_at": IN_THE_FIRST_EPOCH}),
    "stream with a state, no workers": (lambda: stream(StatefulStream(), 0), {"is_fetched": False}),
}


def run(make: Callable[[], Any], *, is_on: bool, **kwargs: Any) -> dict[str, Any]:
    """Train, and tell all that was seen on the way and at the end."""
    seen, hook = Seen(), kwargs.pop("hook", BaseHook)()
    waits_at, bad = kwargs.pop("waits_at", EVERY_STEP), kwargs.pop("bad", ())
    is_fetched, extra_hooks = kwargs.pop("is_fetched", True), kwargs.pop("extra_hooks", [])
    fetched: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look_ahead, "HOSTS", set() if is_on else {"cpu"})
        hooks = [seen, hook, *extra_hooks]
        trainer = Trainer(NUM_STEPS, data_loader=lambda _: make(), hooks_=lambda _: hooks, **kwargs)
        trainer.ids, trainer.waits_at, trainer.bad = [], waits_at if is_fetched else (), bad
        fetch = LookAhead.fetch
        patch.setattr(LookAhead, "fetch", lambda self, n: (fetched.append(trainer.step), fetch(self, n)))
        error = ""
        try:
            with suppress(KeyboardInterrupt):
                trainer.train()
            trainer.train()
        except (OSError, SystemExit) as ex:
            error = type(ex).__name__
    waited = {step for step, *_ in seen.steps if step in waits_at and step != NUM_STEPS}
    assert waited <= set(fetched) if is_on and is_fetched else not fetched
    state = trainer.state_dict()
    state["training_state"].pop("optimizer")
    return {"ids": trainer.ids, "steps": seen.steps, "error": [error, trainer.step], "state": state}


@pytest.mark.filterwarnings("ignore:The data has no `state_dict`")  # a stream in workers that is continued
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_with_and_without(name: str) -> None:
    """Batches, positions, generators and weights at each step and at the end; errors come in the same step."""
    make, kwargs = CASES[name]
    without, ahead = (run(make, is_on=is_on, **kwargs) for is_on in (False, True))
    assert list(differences(without, ahead)) == []
    assert (without["error"][0] == "OSError") == ("unreadable" in name)


@pytest.mark.parametrize("is_on", [False, True], ids=["saved without", "saved ahead"])
@pytest.mark.parametrize("make", [map_style, lambda: stream(StatefulStream())], ids=["map-style", "stream"])
def test_a_run_goes_on_in_the_other_mode(make: Callable[[], Any], is_on: bool, tmp_path: Path) -> None:
    """A checkpoint that was saved while a batch was ahead is resumed without, and the other way round."""
    waits_at = (1, 2, 3, 4) if make is map_style else (1, 2, 4)
    whole = run(make, is_on=False)
    kwargs = {"workspace": tmp_path, "waits_at": waits_at}
    first = run(make, is_on=is_on, hook=Killed, extra_hooks=[CheckpointingHook(4)], **kwargs)
    second = run(make, is_on=not is_on, extra_hooks=[CheckpointingHook(4)], **kwargs)
    assert list(differences(whole["steps"][:6], first["steps"])) == []
    assert list(differences(whole["steps"][4:], second["steps"])) == []
    assert list(differences(whole["state"]["model"], second["state"]["model"])) == []


def test_the_next_batch_is_fetched_before_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of step k + 1 is fetched before the norm of step k is read; the last step fetches none."""
    events: list[str] = []
    fetch, read = LookAhead.fetch, Agreement.read_norm
    monkeypatch.setattr(look_ahead, "HOSTS", set())
    monkeypatch.setattr(LookAhead, "fetch", lambda self, n: (events.append("fetch"), fetch(self, n)))
    monkeypatch.setattr(Agreement, "read_norm", lambda self, n: (events.append("read"), read(self, n))[1])
    trainer = Trainer(4, data_loader=lambda _: map_style())
    trainer.ids, trainer.waits_at = [], EVERY_STEP
    trainer.train()
    assert events == [*["fetch", "read"] * 3, "read"]


class OwnTo:
    """Is moved in a way of its own."""

    def __init__(self) -> None:
        self.moves: list[str] = []

    def to(self, device: Any, **kwargs: Any) -> OwnTo:
        self.moves.append(str(device))
        return self


def test_what_is_more_than_tensors_is_moved_when_it_is_drawn() -> None:
    """An object with a `to` of its own might use the device, so it is fetched ahead and not moved."""
    own = OwnTo()
    moves: list[Any] = []
    ahead = LookAhead(torch.device("cpu"), lambda batch: (moves.append(batch), batch)[1])
    ahead.fetch(lambda: {"x": torch.ones(2), "own": [own]})
    assert (ahead.is_empty, moves) == (False, [])
    ahead.take(lambda: None)
    assert (ahead.is_empty, len(moves)) == (True, 1)


def test_a_copy_that_fails_is_made_again() -> None:
    """The device's memory may be full during the backward pass only. The batch is counted before the second try."""
    full = torch.OutOfMemoryError("full")
    results: list[Any] = [full, torch.zeros(2), full, OSError("gone")]
    counted: list[int] = []

    def send(batch: Any) -> Any:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    ahead = LookAhead(torch.device("cpu"), send)
    ahead.fetch(lambda: torch.ones(2))
    assert torch.equal(ahead.take(lambda: counted.append(1)), torch.zeros(2))
    ahead.fetch(lambda: torch.ones(2))
    with pytest.raises(OSError, match="gone"):
        ahead.take(lambda: counted.append(2))
    assert counted == [1, 2]


def test_only_a_device_that_works_by_itself_is_worth_it() -> None:
    """Not the CPU, and no device without streams."""
    loader = DataLoader(Noisy(), batch_size=2)
    for device in ("cpu", "meta", "mps"):
        assert not look_ahead.looks_ahead(torch.device(device))
    feed = DataFeed(loader, seed=0, rank=0, world_size=1, device=torch.device("cpu"))
    assert not feed.can_look_ahead
