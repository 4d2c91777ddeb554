"""Every sample of every epoch exactly once, at any number of processes, from any position on."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from trainloop import DataReplayWarning
from trainloop.data.feed import DataFeed

CPU = torch.device("cpu")
N = 10


class Numbers(Dataset):  # type: ignore[type-arg]
    """Sample i is i, with noise from each of the three generators where asked for."""

    def __init__(self, noisy: bool = False) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(()).item() + np.random.rand() if self.noisy else 0.0
        return torch.tensor([index, noise], dtype=torch.float64)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, n: int = N) -> None:
        self.n = n

    def __iter__(self) -> Any:
        return iter(torch.arange(self.n))


class StatefulStream(Stream):
    """Knows its position, and counts what it reads."""

    reads = position = 0

    def __iter__(self) -> Any:
        while self.position < self.n:
            self.position += 1
            self.reads += 1
            yield torch.tensor(self.position - 1)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class EvenBatches(Sampler):  # type: ignore[type-arg]
    """A batch sampler of its own kind: batches of unequal length, in an order that depends on the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        batches = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]
        return iter(batches[self.epoch % 4 :] + batches[: self.epoch % 4])


class EndlessOrder(Sampler):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        while True:
            yield from torch.randperm(N, generator=generator).tolist()


def feeds(make_loader: Any, world_size: int = 1, seed: int = 0) -> list[DataFeed]:
    return [
        DataFeed(make_loader(), seed=seed, rank=rank, world_size=world_size, device=CPU) for rank in range(world_size)
    ]


def draw(feed: DataFeed, count: int) -> list[Any]:
    """Start, draw, and close."""
    with feed:
        feed.start()
        return [next(feed) for _ in range(count)]


def ids(batches: list[Any]) -> list[list[int]]:
    return [[int(row[0] if row.dim() else row) for row in batch] for batch in batches]


def interleaved(by_rank: list[list[list[int]]]) -> list[int]:
    """The samples in the order of the global batches."""
    return [i for batches in zip(*by_rank, strict=True) for batch in batches for i in batch]


LOADERS = {
    "shuffled": lambda: DataLoader(Numbers(), batch_size=2, shuffle=True),
    "in order": lambda: DataLoader(Numbers(), batch_size=2),
    "two workers": lambda: DataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=2),
    "its own generator": lambda: DataLoader(Numbers(), batch_size=2, shuffle=True, generator=torch.Generator()),
    "distributed sampler": lambda: DataLoader(
        Numbers(), batch_size=2, sampler=DistributedSampler(Numbers(), num_replicas=2, rank=1)
    ),
    "explicit batch sampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), 2, False)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_epoch_has_every_sample_once(name: str, world_size: int) -> None:
    """Also at a number of processes that doesn't divide the data: batches straddle the ends of epochs."""
    num_epochs = 6
    count = num_epochs * N // (2 * world_size)
    seen = interleaved([ids(draw(feed, count)) for feed in feeds(LOADERS[name], world_size)])
    epochs = [seen[i : i + N] for i in range(0, num_epochs * N, N)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * num_epochs
    assert (epochs[0] != epochs[1]) == (name not in ("in order", "stream"))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("worlds", [(1, 1), (2, 2), (4, 2), (2, 3), (1, 2)])
def test_a_resumed_run_goes_on_with_the_next_sample(name: str, worlds: tuple[int, int]) -> None:
    """From any position, at another number of processes too: both runs together see what one run sees."""
    before, after = worlds
    whole = interleaved([ids(draw(feed, 36)) for feed in feeds(LOADERS[name])])
    for count in (0, 1, 3, 6):
        first = feeds(LOADERS[name], before)
        seen = interleaved([ids(draw(feed, count)) for feed in first])
        second = feeds(LOADERS[name], after)
        for rank, feed in enumerate(second):
            own = first[rank].rank_state_dict() if before == after else None
            feed.load_state_dict(first[0].state_dict(), own)
        rest = 24 // after // 2
        if name == "stream" and (count * before * 2) % N:
            with pytest.warns(DataReplayWarning, match=f"the run reads {count * before * 2 % N} samples again"):
                seen += interleaved([ids(draw(feed, rest)) for feed in second])
        else:
            seen += interleaved([ids(draw(feed, rest)) for feed in second])
        assert seen == whole[: len(seen)], count


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_is_the_same_after_a_resume(num_workers: int) -> None:
    """Random numbers drawn for a sample: by the process's generators without workers, by sample and epoch with them,
    whichever worker serves it.
    """

    def make() -> DataLoader[Any]:
        return DataLoader(Numbers(noisy=True), batch_size=3, shuffle=True, num_workers=num_workers)

    def seeded() -> None:
        torch.manual_seed(5)
        np.random.seed(5)

    seeded()
    whole = draw(feeds(make)[0], 9)
    seeded()
    (first,) = feeds(make)
    seen = draw(first, 4)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    torch.rand(3)
    (second,) = feeds(make)
    second.load_state_dict(first.state_dict(), first.rank_state_dict())
    with second:
        second.start()
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        seen += [next(second) for _ in range(5)]
    assert torch.equal(torch.cat(seen), torch.cat(whole))
    assert len(torch.cat(whole)[:, 1].unique()) == 27


def test_the_process_generators_are_left_alone() -> None:
    """Shuffling and starting workers draws nothing that a resumed run would draw a second time."""
    before = torch.get_rng_state()
    for name in ("shuffled", "two workers"):
        draw(feeds(LOADERS[name])[0], 12)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_is_that_of_the_seed() -> None:
    """The same for the same seed, another for another."""
    one, same, other = (ids(draw(feeds(LOADERS["shuffled"], seed=seed)[0], 5)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_tail_is_dropped_if_the_loader_says_so() -> None:
    """`drop_last=True`: what doesn't fill a global batch is left out of each epoch."""
    by_rank = [
        ids(draw(feed, 4)) for feed in feeds(lambda: DataLoader(Numbers(), batch_size=2, drop_last=True), world_size=2)
    ]
    assert by_rank == [[[0, 1], [4, 5], [0, 1], [4, 5]], [[2, 3], [6, 7], [2, 3], [6, 7]]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_sampler_of_another_kind_keeps_its_batches(num_workers: int) -> None:
    """They are dealt to the ranks whole, each once an epoch, and the sampler learns the epoch."""

    def make() -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_sampler=EvenBatches(), num_workers=num_workers)

    a, b = (ids(draw(feed, 4)) for feed in feeds(make, world_size=2))
    assert a == [[0, 1, 2], [4, 5, 6, 7], [3], [8, 9]]
    assert b == [[3], [8, 9], [4, 5, 6, 7], [0, 1, 2]]


def test_samplers_that_repeat_or_never_end_are_taken_as_they_are() -> None:
    """Weighted sampling gives what it gives, the same again after a restart; an endless order goes on without end."""

    def weighted() -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_size=2, sampler=WeightedRandomSampler([0.0, 1.0, 1.0, *[0.0] * 7], 8))

    first, again = (ids(draw(feeds(weighted)[0], 12)) for _ in range(2))
    assert first == again
    assert set(itertools.chain(*first)) == {1, 2}
    endless = interleaved(
        [
            ids(draw(feed, 6))
            for feed in feeds(lambda: DataLoader(Numbers(), batch_size=2, sampler=EndlessOrder()), world_size=2)
        ]
    )
    assert [sorted(endless[:N]), sorted(endless[N : 2 * N])] == [list(range(N))] * 2


def test_a_data_set_that_batches_itself_gets_single_keys() -> None:
    """`batch_size=None`: what the data set returns for a key is the batch."""
    loader = DataLoader(Numbers(), batch_size=None, sampler=[[0, 1], [2, 3], [4, 5]])
    loader = DataLoader(TensorDataset(torch.arange(N)), batch_size=None, sampler=[[0, 1], [2, 3], [4, 5]])
    batches = [draw(feed, 3) for feed in feeds(lambda: loader, world_size=2)]
    assert [[batch[0].tolist() for batch in own] for own in batches] == [
        [[0, 1], [4, 5], [2, 3]],
        [[2, 3], [0, 1], [4, 5]],
    ]


def test_a_list_of_batches_is_dealt_to_the_ranks() -> None:
    """Epoch after epoch, and from any position."""
    a, b = feeds(lambda: [0, 1, 2, 3, 4], world_size=2)
    assert [draw(a, 5), draw(b, 5)] == [[0, 2, 4, 1, 3], [1, 3, 0, 2, 4]]
    assert draw(a, 2) == [0, 2], "it goes on where it stood"


def test_any_other_iterable_is_read_in_order() -> None:
    """A generator goes on, an object that can be iterated again is, once it ends. Several ranks share the batches."""
    assert [draw(feed, 2) for feed in feeds(lambda: (i for i in range(5)), world_size=2)] == [[0, 2], [1, 3]]
    assert draw(feeds(lambda: (i for i in range(5)))[0], 4) == [0, 1, 2, 3]
    (feed,) = feeds(lambda: {3: "c", 5: "e"}.keys())
    assert draw(feed, 5) == [3, 5, 3, 5, 3]
    assert feed.epoch == 2


def test_data_that_knows_its_position_is_asked_for_it() -> None:
    """A resumed run reads nothing twice."""
    first = StatefulStream()
    (feed,) = feeds(lambda: DataLoader(first, batch_size=2))
    draw(feed, 7)
    second = StatefulStream()
    (resumed,) = feeds(lambda: DataLoader(second, batch_size=2))
    resumed.load_state_dict(feed.state_dict(), feed.rank_state_dict())
    assert ids(draw(resumed, 4)) == [[4, 5], [6, 7], [8, 9], [0, 1]]
    assert second.reads == 8


def test_data_that_does_not_is_drawn_again_with_a_warning() -> None:
    """It says how much."""
    (first,) = feeds(lambda: {i: i for i in range(5)}.values())
    draw(first, 8)
    (second,) = feeds(lambda: {i: i for i in range(5)}.values())
    second.load_state_dict(first.state_dict(), first.rank_state_dict())
    with pytest.warns(DataReplayWarning, match="the run reads 3 batches again"):
        assert draw(second, 3) == [3, 4, 0]


def test_a_position_is_not_taken_for_one_of_other_data() -> None:
    """Resuming with another kind of data is told."""
    (a,), (b,) = feeds(LOADERS["shuffled"]), feeds(LOADERS["stream"])
    with pytest.raises(ValueError, match="saved by a IndexedSource, but `build_data_loader` now gives a SampledSource"):
        b.load_state_dict(a.state_dict(), None)


def test_a_prepared_loader_is_used_as_it_is() -> None:
    """And it is not left active in Accelerate's state, where it would upset later windows."""
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Numbers(), batch_size=4))
    assert ids(draw(feeds(lambda: loader)[0], 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not accelerator.gradient_state.in_dataloader


class Pair(NamedTuple):
    x: torch.Tensor
    name: str


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    names: list[str]


BATCHES = {
    "tensor": torch.ones(2),
    "tuple": (torch.ones(2), "a"),
    "dict": {"x": torch.ones(2), "names": ["a", "b"]},
    "named tuple": Pair(torch.ones(2), "a"),
    "dataclass": Record(torch.ones(2), ["a"]),
    "nested": [{"x": Record(torch.ones(2), ["a"])}, collections.OrderedDict(y=torch.ones(1))],
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_every_kind_are_moved(name: str) -> None:
    """All tensors land on the device, containers keep their type, strings stay."""
    batch = BATCHES[name]
    (moved,) = draw(DataFeed([batch], seed=0, rank=0, world_size=1, device=torch.device("meta")), 1)

    def kinds(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if dataclasses.is_dataclass(value):
            return type(value), kinds(vars(value))
        if isinstance(value, dict):
            return type(value), {key: kinds(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value), [kinds(item) for item in value]
        return value

    assert str(kinds(moved)) == str(kinds(batch)).replace("cpu", "meta")
    assert "meta" in str(kinds(moved))
    assert draw(DataFeed([batch], seed=0, rank=0, world_size=1, device=CPU), 1)[0] is batch
