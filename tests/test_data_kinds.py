"""Every kind of data at 1, 2 and 3 ranks, with and without workers: each sample once an epoch, alike after a restart.

The ranks are feeds in one process. Each has random generators of its own, as the ranks of a run have.
"""

from __future__ import annotations

import importlib
import itertools
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    get_worker_info,
)

from trainloop import DataReplayWarning, RedundantReadWarning
from trainloop.data import per_rank, read_cost
from trainloop.data.feed import DataFeed
from trainloop.data.order import Order
from trainloop.rng import derived_seed, lent_rng

from . import streams
from .small import SmallTrainer

CPU = torch.device("cpu")
N = 30
BATCH = 4


class Numbers(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Shuffles, and splits the samples over the workers, as the documentation of torch recommends."""

    def __init__(self, shuffle: Callable[[list[int]], list[int]] = list, n: int = N) -> None:
        self.shuffle, self.n = shuffle, n

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        numbers = range(self.n) if info is None else range(info.id, self.n, info.num_workers)
        return iter(self.shuffle(list(numbers)))


class EpochStream(Stream):
    """Another order in each epoch, by `set_epoch`."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.shuffle = lambda numbers: random.Random(epoch).sample(numbers, len(numbers))


class StatefulStream(Stream):
    """Goes on where it stood, and draws its order while it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] | None = None

    def __iter__(self) -> Iterator[int]:
        if self.left is None:
            self.left = list(super().__iter__())
        while self.left:
            yield self.left.pop(random.randrange(len(self.left)))
        self.left = None

    def state_dict(self) -> dict[str, Any]:
        return {"left": None if self.left is None else list(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = state["left"]


def shuffled_by_all(numbers: list[int]) -> list[int]:
    """With the global generators of Python, numpy and torch."""
    numbers = random.sample(numbers, len(numbers))
    numbers = [numbers[i] for i in np.random.permutation(len(numbers))]
    return [numbers[i] for i in torch.randperm(len(numbers)).tolist()]


class Shuffler(Sampler):  # type: ignore[type-arg]
    """Draws from `rng`, which it holds."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        numbers = list(range(N))
        self.rng.shuffle(numbers)
        return iter(numbers)


class Unsized(Sampler):  # type: ignore[type-arg]
    """Has no length, and draws from the global generator."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(N).tolist()


class ByEpoch(Sampler):  # type: ignore[type-arg]
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(self.epoch).sample(range(N), N))


class OwnBatches(BatchSampler):
    """Batches of 1, 2, 3 and 4 samples in turn, of what the sampler inside it yields."""

    def __len__(self) -> int:
        return N * 4 // 10

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(self.sampler)
        for size in itertools.cycle((1, 2, 3, 4)):
            if not (batch := list(itertools.islice(numbers, size))):
                return
            yield batch


class Remembering(Sampler):  # type: ignore[type-arg]
    """Draws from a generator that nobody finds, and keeps its state itself."""

    def __init__(self) -> None:
        self.state = random.Random(5).getstate()

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        rng = random.Random()
        rng.setstate(self.state)
        numbers = rng.sample(range(N), N)
        self.state = rng.getstate()
        return iter(numbers)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


def map_style(**options: Any) -> Callable[[int, int, int], DataLoader[Any]]:
    """A loader of `Numbers`; options that are functions are called for each loader."""

    def make(rank: int, world_size: int, num_workers: int) -> DataLoader[Any]:
        made = {name: value() if callable(value) else value for name, value in options.items()}
        size = {} if "batch_sampler" in made else {"batch_size": BATCH}
        return DataLoader(Numbers(), num_workers=num_workers, **size, **made)

    return make


def stream(make_dataset: Callable[[], Any], **options: Any) -> Callable[[int, int, int], DataLoader[Any]]:
    return lambda rank, world_size, num_workers: DataLoader(
        make_dataset(), batch_size=BATCH, num_workers=num_workers, **options
    )


KINDS: dict[str, Callable[[int, int, int], Any]] = {
    "shuffled": map_style(shuffle=True),
    "in order": map_style(),
    "its own generator": map_style(shuffle=True, generator=torch.Generator),
    "sampler with random.Random": map_style(sampler=lambda: Shuffler(random.Random(0))),
    "sampler with numpy's Generator": map_style(sampler=lambda: Shuffler(np.random.default_rng(0))),
    "sampler with numpy's RandomState": map_style(sampler=lambda: Shuffler(np.random.RandomState(0))),
    "sampler without a length": map_style(sampler=Unsized),
    "sampler with a state": map_style(sampler=Remembering),
    "batch sampler around a generator": map_style(
        batch_sampler=lambda: OwnBatches(RandomSampler(Numbers(), generator=torch.Generator()), BATCH, False)
    ),
    "batch sampler around set_epoch": map_style(batch_sampler=lambda: OwnBatches(ByEpoch(), BATCH, False)),
    "distributed sampler": map_style(sampler=lambda: DistributedSampler(Numbers(), num_replicas=2, rank=1)),
    "stream": stream(Stream),
    "stream of global generators": stream(lambda: Stream(shuffled_by_all)),
    "stream with set_epoch": stream(EpochStream),
    "stream with a state": stream(StatefulStream),
    "stream with a state in its iterator": stream(streams.WithStatefulIterator),
    "stream in a stateful loader": lambda rank, world_size, num_workers: streams.stateful_loader(
        StatefulStream(), num_workers
    ),
    "Hugging Face, rows": streams.hugging_face(lambda table: table, shuffle=True),
    "Hugging Face, torch's format": streams.hugging_face(lambda table: table.with_format("torch"), shuffle=True),
    "Hugging Face, a transform": streams.hugging_face(
        lambda table: table.with_transform(streams.add_noise), shuffle=True
    ),
    "Hugging Face, stream of 7 shards": streams.hugging_face(lambda table: table.to_iterable_dataset(num_shards=7)),
    "bare iterable of batches": lambda rank, world_size, num_workers: streams.Batches(),
}
IN_ORDER = {"in order", "stream", "stream with a state in its iterator", "bare iterable of batches"}
SHARES: dict[str, Callable[[int, int, int], Any]] = {
    "sharded stream": stream(streams.Sharded),
    "sharded stream with a state": stream(streams.ShardedWithState),
    "Hugging Face, stream of 6 shards": streams.hugging_face(lambda table: table.to_iterable_dataset(num_shards=6)),
}
"""Each rank reads its share."""


def seed_differently(*parts: Any) -> None:
    seed = hash(parts) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Ranks:
    """The feeds of all ranks, each with generators of its own."""

    def __init__(self, make: Callable[[int, int, int], Any], world_size: int, num_workers: int = 0) -> None:
        self.feeds = [
            DataFeed(make(rank, world_size, num_workers), seed=1, rank=rank, world_size=world_size, device=CPU)
            for rank in range(world_size)
        ]

    def draw(self, count: int) -> list[list[list[int]]]:
        """The next batches, by rank. What the ranks compare must be the same."""
        drawn = []
        for rank, feed in enumerate(self.feeds):
            seed_differently(rank, feed.position)
            with feed:
                feed.start()
                drawn.append([streams.numbers_of(next(feed)) for _ in range(count)])
        assert len({feed.checksum for feed in self.feeds}) == 1
        return drawn

    def resume(self, other: Ranks) -> None:
        """Go to the position of other ranks, which may be more or fewer."""
        for rank, feed in enumerate(self.feeds):
            own = other.feeds[rank].rank_state_dict() if len(self.feeds) == len(other.feeds) else None
            feed.load_state_dict(other.feeds[0].state_dict(), own)


def samples(drawn: list[list[list[int]]]) -> list[int]:
    """In the order of the global batches."""
    return [i for batches in zip(*drawn, strict=True) for batch in batches for i in batch]


def epochs(numbers: list[int]) -> list[list[int]]:
    """The whole ones of a run from the beginning."""
    return [numbers[i : i + N] for i in range(0, len(numbers) - N + 1, N)]


def cases(kinds: Iterable[str]) -> list[Any]:
    """Each kind at 1, 2 and 3 ranks, with 0 and 2 workers. Of the newest kinds, those that start many processes are
    slow.
    """
    found = []
    for kind, world_size, num_workers in itertools.product(kinds, [1, 2, 3], [0, 2]):
        if num_workers and "bare" in kind:
            continue
        is_newest = "Hugging" in kind or "shard" in kind or "iterator" in kind or "loader" in kind
        is_slow = is_newest and num_workers > 0 and world_size != (3 if "7" in kind else 2)
        found.append(pytest.param(kind, world_size, num_workers, marks=[pytest.mark.slow] * is_slow))
    return found


@pytest.mark.parametrize(("kind", "world_size", "num_workers"), cases(KINDS))
@pytest.mark.filterwarnings("ignore::trainloop.DataReplayWarning", "ignore::trainloop.RedundantReadWarning")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # of torchdata, with a new torch
def test_each_sample_is_seen_once_an_epoch(kind: str, world_size: int, num_workers: int) -> None:
    """Over three epochs, by all ranks together, whatever the ranks' own generators draw. A run that is killed in the
    middle of an epoch goes on with the same batches, and at another number of ranks with the samples that are left.
    """
    make = KINDS[kind]
    per_step = 2.5 if "batch sampler" in kind or "bare" in kind else BATCH
    count = -(-int(3 * N / per_step + 4) // world_size)
    ranks = Ranks(make, world_size, num_workers)
    whole = ranks.draw(count)
    found = epochs(samples(whole))
    assert len(found) >= 3
    assert [sorted(epoch) for epoch in found] == [list(range(N))] * len(found)
    if not (num_workers and "stream" in kind):  # where the epoch's end decides which worker begins the next one
        assert (found[0] != found[1]) == (kind not in IN_ORDER)

    for killed_at in (count // 3, count // 2 + 1)[: 1 if num_workers else 2]:
        first = Ranks(make, world_size, num_workers)
        seen = first.draw(killed_at)
        again = Ranks(make, world_size, num_workers)
        again.resume(first)
        rest = again.draw(count - killed_at)
        assert [a + b for a, b in zip(seen, rest, strict=True)] == whole, killed_at
        other_size = world_size % 3 + 1
        other = Ranks(make, other_size, num_workers)
        other.resume(first)
        goes_on = samples(other.draw(int(2 * N / per_step) // other_size))
        both = epochs(samples(seen) + goes_on)
        assert [sorted(epoch) for epoch in both] == [list(range(N))] * len(both), killed_at


@pytest.mark.parametrize(("kind", "world_size", "num_workers"), cases(SHARES))
@pytest.mark.filterwarnings("ignore::trainloop.DataReplayWarning")
def test_each_rank_reads_its_share_once_an_epoch(kind: str, world_size: int, num_workers: int) -> None:
    """Over three epochs, and all shares together are the data. A run that is killed in the middle of an epoch goes on
    with the same batches. At another number of ranks it is told that it can't, and with how many samples.
    """
    make, count = SHARES[kind], -(-3 * N // world_size // BATCH) + 1
    whole = Ranks(make, world_size, num_workers).draw(count)
    of_rank = [list(itertools.chain(*batches)) for batches in whole]
    size = N // world_size
    for epoch in range(3):
        shares = [own[epoch * size : (epoch + 1) * size] for own in of_rank]
        assert sorted(itertools.chain(*shares)) == list(range(N)), epoch
    if "Hugging" in kind:
        assert of_rank[0][:size] != of_rank[0][size : 2 * size], "the files are read in another order"

    for killed_at in (count // 3, count // 2 + 1)[: 1 if num_workers else 2]:
        first, again = Ranks(make, world_size, num_workers), Ranks(make, world_size, num_workers)
        seen = first.draw(killed_at)
        again.resume(first)
        streams.reads.clear()
        rest = again.draw(count - killed_at)
        assert [a + b for a, b in zip(seen, rest, strict=True)] == whole, killed_at
        if kind == "sharded stream with a state" and not num_workers:
            assert len(streams.reads) == len(list(itertools.chain(*itertools.chain(*rest)))), "nothing is read again"
    other = Ranks(make, world_size % 3 + 1, num_workers)
    num_seen = first.feeds[0].state_dict()["position"] * world_size
    with pytest.warns(DataReplayWarning, match=f"saved by {world_size} processes, .* up to {num_seen} samples"):
        other.resume(first)
    assert {feed.state_dict()["position"] for feed in other.feeds} == {num_seen // len(other.feeds)}
    other.draw(2)


# ---------------------------------------------------------------------- another sampler, loader or number of workers


class Forgetful(Remembering):
    """Draws from a generator that nobody finds, and does not keep its state."""

    state_dict = load_state_dict = None  # type: ignore[assignment]


def test_another_order_at_the_resume_is_refused() -> None:
    """The saved position has a checksum of its epoch's order."""
    first = Ranks(map_style(sampler=Forgetful), 1)
    seen = samples(first.draw(12))
    assert sorted(seen[:N]) == sorted(range(N))
    (feed,) = Ranks(map_style(sampler=Forgetful), 1).feeds
    with pytest.raises(ValueError, match=r"The Forgetful .* another order of epoch 1 than .* `set_epoch`; or `state_"):
        feed.load_state_dict(first.feeds[0].state_dict(), None)


def test_an_order_is_kept_when_the_feed_is_started_again() -> None:
    """A second `train` goes on in the order of the epoch, also if the sampler would give another one."""
    ranks = Ranks(map_style(sampler=Forgetful), 2)
    seen = [samples(ranks.draw(1)) for _ in range(3)]
    assert len(set(itertools.chain(*seen))) == 3 * 2 * BATCH


def test_the_position_counts_samples_whatever_makes_the_batches() -> None:
    """From batches of 4 to a batch sampler of another kind, in its middle, and back."""
    first = Ranks(map_style(), 1)
    seen = samples(first.draw(3))
    second = Ranks(map_style(batch_sampler=lambda: OwnBatches(range(N), BATCH, False)), 1)
    second.resume(first)
    (drawn,) = second.draw(4)
    assert drawn == [[12], [13, 14, 15], [16, 17, 18, 19], [20]]
    third = Ranks(map_style(), 1)
    third.resume(second)
    assert seen + list(itertools.chain(*drawn)) + samples(third.draw(2)) == list(range(29))


def test_a_position_of_an_older_version_is_understood() -> None:
    """Trainloop 0.1.0 counted the batches of a batch sampler of another kind, and saved no checksum."""
    (feed,) = Ranks(map_style(batch_sampler=lambda: OwnBatches(range(N), BATCH, False)), 1).feeds
    feed.load_state_dict({"kind": "IndexedSource", "seed": 1, "epoch": 0, "position": 3}, None)
    assert feed.position == (0, 6)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_streams_in_workers_go_on_as_if_they_had_not_been_closed(num_workers: int) -> None:
    """Two `train`s see what one sees, and draw nothing twice from the process's generators."""
    make = KINDS["stream of global generators"]
    whole = Ranks(make, 1, num_workers).draw(16)
    ranks = Ranks(make, 1, num_workers)
    parts = ranks.draw(11)
    (feed,) = ranks.feeds
    before = torch.get_rng_state()
    with pytest.warns(DataReplayWarning, match="the run reads 14 samples again"):
        feed.start()
    parts[0] += [next(feed).tolist() for _ in range(5)]
    feed.close()
    assert torch.equal(torch.get_rng_state(), before)
    assert parts == whole


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.filterwarnings("ignore::trainloop.DataReplayWarning")
@pytest.mark.parametrize("kind", ["stream of global generators", "of each rank"])
def test_a_run_that_is_continued_equals_one_that_was_not(kind: str, num_workers: int) -> None:
    """`train` to step 11 and then to 16, with dropout: every bit is that of `train` to step 16 at once."""

    def trainer(max_steps: int) -> SmallTrainer:
        make = KINDS.get(kind, of_rank)
        return SmallTrainer(
            max_steps,
            data_loader=lambda self: make(0, 1, num_workers),
            forward_=lambda self, batch: (
                self.model(nn.functional.dropout(batch[:, None] / torch.tensor([N]).expand(3))).mean(),
                {},
            ),
        )

    whole, parts = trainer(16), trainer(11)
    whole.train()
    parts.train()
    parts.max_steps = 16
    parts.train()
    for name, param in whole.named_parameters().items():
        assert torch.equal(param, parts.named_parameters()[name]), name


def test_another_number_of_workers_is_told_with_the_number() -> None:
    """One worker reads as none does, so that is exact. The order of two is another one."""
    first = Ranks(KINDS["stream"], 2)
    first.draw(2)
    one = Ranks(KINDS["stream"], 2, num_workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataReplayWarning)
        one.resume(first)
    with pytest.warns(DataReplayWarning, match="the run reads 16 samples again"):
        assert samples(one.draw(1)) == list(range(16, 24))
    two = Ranks(KINDS["stream"], 2, num_workers=2)
    with pytest.warns(
        DataReplayWarning, match="saved with 1 workers, and this run has 2.* up to 16 samples are seen twice"
    ):
        two.resume(first)
    with pytest.warns(DataReplayWarning, match="the run reads 16 samples again"):
        assert samples(two.draw(1)) == [16, 18, 20, 22, 24, 26, 28, 17]


class Shifting(Stream):
    """Of two workers, one has 18 samples and the other has 1; in the next epoch it is the other way round."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(18) if info is not None and info.id == self.epoch % 2 else [18])


def test_little_data_in_many_workers() -> None:
    """No worker has a whole global batch: each sample is seen once an epoch all the same. Where that would need a
    worker that has changed its share, the error says so.
    """
    found = samples(Ranks(stream(lambda: Stream(n=10)), 2, num_workers=2).draw(5))
    assert [sorted(found[i : i + 10]) for i in range(0, 40, 10)] == [list(range(10))] * 4
    with pytest.raises(ValueError, match="No worker gives the 5 samples that a global batch at the end of epoch 0"):
        Ranks(stream(Shifting), 2, num_workers=2).draw(4)


class Part(Stream):
    """A part of the numbers, which `take_part` chooses in each worker, as the documentation of torch has it."""

    begin, end = 0, N

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.begin, self.end))


class Shifted(Numbers):
    begin = 0

    def __getitem__(self, index: int) -> int:
        return index + self.begin


def take_part(worker: int) -> None:
    info: Any = get_worker_info()
    assert isinstance(info.dataset, Part | Shifted)
    share = N // info.num_workers
    info.dataset.begin, info.dataset.end = worker * share, (worker + 1) * share


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_init_fn_may_set_attributes_of_the_data_set(context: str) -> None:
    """Each worker reads the part that it was given. It read all of the data."""
    options: dict[str, Any] = {"worker_init_fn": take_part, "multiprocessing_context": context}
    found = samples(Ranks(stream(Part, **options), 1, num_workers=2).draw(15))
    assert [sorted(found[:N]), sorted(found[N:])] == [list(range(N))] * 2
    loader = DataLoader(Shifted(), batch_size=5, num_workers=2, **options)
    with DataFeed(loader, seed=0, rank=0, world_size=1, device=CPU) as feed:
        feed.start()
        assert [next(feed).tolist() for _ in range(2)] == [[0, 1, 2, 3, 4], [20, 21, 22, 23, 24]]


def test_a_tail_of_streams_in_workers_is_dropped_if_the_loader_says_so() -> None:
    """Of 30 samples, the 6 that do not fill the last global batch."""
    found = samples(Ranks(stream(Stream, drop_last=True), 2, num_workers=2).draw(6))
    assert len(set(found[:24])) == len(set(found[24:])) == 24


# ---------------------------------------------------------------------- each rank's own


def of_rank(rank: int, world_size: int, num_workers: int) -> Any:
    numbers = Numbers()
    sampler = DistributedSampler(numbers, world_size, rank, shuffle=True)
    return per_rank(DataLoader(numbers, BATCH, sampler=sampler, num_workers=num_workers))


def of_rank_with_state(rank: int, world_size: int, num_workers: int) -> Any:
    class Batches:
        position = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            while self.position < 5:
                self.position += 1
                yield torch.tensor([self.position + 10 * rank])
            self.position = 0

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    return per_rank(Batches())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_of_each_rank_is_taken_as_it_is(num_workers: int) -> None:
    """Each rank yields its own, the sampler learns the epoch, and a resume goes on with the same batches."""
    whole = Ranks(of_rank, 2, num_workers).draw(10)
    for drawn, rank in zip(whole, range(2), strict=True):
        sampler = DistributedSampler(Numbers(), 2, rank, shuffle=True)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            assert list(itertools.chain(*drawn[4 * epoch : 4 * epoch + 4])) == list(sampler)
    first, again = Ranks(of_rank, 2, num_workers), Ranks(of_rank, 2, num_workers)
    seen = first.draw(6)
    again.resume(first)
    with pytest.warns(DataReplayWarning, match="the run reads 2 batches again"):
        assert [a + b for a, b in zip(seen, again.draw(4), strict=True)] == whole


def test_data_of_each_rank_with_a_state_is_not_drawn_again() -> None:
    """The resume is exact. At another number of processes it is told what it does."""
    first, again = Ranks(of_rank_with_state, 2), Ranks(of_rank_with_state, 2)
    first.draw(7)
    again.resume(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataReplayWarning)
        assert again.draw(2) == [[[3], [4]], [[13], [14]]]
    with pytest.warns(DataReplayWarning, match=r"saved by 2 processes, and this run has 3\. Each rank skips 2 batches"):
        Ranks(of_rank_with_state, 3).resume(first)


def test_what_is_not_iterable_is_told() -> None:
    """`per_rank` takes batches only."""
    for value in (3, "text", {"train": []}):
        with pytest.raises(TypeError, match="`loader` must be an iterable of batches, but is "):
            per_rank(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_samples", [None, 7, 2 * N + 3])
def test_a_permutation_is_that_of_torchs_sampler(num_samples: int | None) -> None:
    """It is kept as a tensor, which takes a fifth of a list's memory."""
    sampler = RandomSampler(Numbers(), num_samples=num_samples)
    order = Order(sampler, 3, 4)
    with lent_rng(derived_seed(3, 4)):
        assert list(order.all_items()) == list(sampler)
    assert isinstance(order._items, torch.Tensor)


# ---------------------------------------------------------------------- what a stream costs and loses


class CountedStream(Stream):
    def __iter__(self) -> Iterator[int]:
        for number in super().__iter__():
            streams.reads.append(number)
            yield number


@pytest.mark.parametrize(
    ("make", "expected"), [(streams.Sharded, 12), (streams.ShardedWithState, 12), (CountedStream, 24)]
)
def test_a_rank_that_has_a_share_reads_nothing_else(make: Callable[[], Any], expected: int) -> None:
    """Three batches of 4 at two ranks. Without a share, every rank reads those of the other one too."""
    (feed, _) = Ranks(stream(make), 2).feeds
    streams.reads.clear()
    with feed:
        feed.start()
        for _ in range(3):
            next(feed)
    assert len(streams.reads) == expected


def test_another_method_named_shard_is_not_called() -> None:
    """Only one that takes `rank` and `world_size`. What it returns must be a data set."""

    class Other(Stream):
        def shard(self, num_shards: int, index: int) -> Any:
            raise AssertionError

    class Wrong(Stream):
        def shard(self, rank: int, world_size: int) -> int:
            return rank

    assert sorted(samples(Ranks(stream(Other), 2).draw(3))) == list(range(24))
    with pytest.raises(TypeError, match=r"`Wrong\.shard` must return an iterable data set or None, but returned int"):
        Ranks(stream(Wrong), 2)


class Clock:
    """Time passes only where a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("step_seconds", "share"), [(9, r"5\.0%"), (999, None)])
def test_reading_everything_is_told_where_it_costs_time(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, share: str | None
) -> None:
    """A batch takes a second to read, half of it for the other rank. Below 1 % of a step nothing is said."""
    clock = Clock()
    monkeypatch.setattr(read_cost, "time", clock)

    class Slow(Stream):
        def __iter__(self) -> Iterator[int]:
            for number in super().__iter__():
                clock.now += 1 / (2 * BATCH)
                yield number

    feed, other = Ranks(stream(lambda: Slow(n=400)), 2).feeds
    found = []
    for own in (feed, other):
        with own, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            own.start()
            for _ in range(45):
                next(own)
                clock.now += step_seconds
        found.append([str(warning.message) for warning in caught if warning.category is RedundantReadWarning])
    assert found[1] == [], "rank 0 says it"
    assert len(found[0]) == (share is not None)
    if share is not None:
        assert re.search(f"takes {share} of the time of a step. Give the data set `shard", found[0][0])


def test_more_ranks_than_shards_are_told_with_their_cost() -> None:
    """Hugging Face: 2 ranks can't share 7 files, so both read all of them."""
    feed, _ = Ranks(KINDS["Hugging Face, stream of 7 shards"], 2).feeds
    with pytest.warns(RedundantReadWarning, match="% of the time of a step.* has 7 shards, and 2 processes can't"):
        drain(feed, 60)


def drain(feed: DataFeed, count: int) -> list[Any]:
    with feed:
        feed.start()
        return [next(feed) for _ in range(count)]


def shuffled(**options: Any) -> Callable[[int, int, int], Any]:
    return lambda rank, world_size, num_workers: DataLoader(
        streams.hugging_face_table().to_iterable_dataset(num_shards=6).shuffle(**options),
        batch_size=3,
        num_workers=num_workers,
    )


def test_what_a_state_does_not_contain_is_told() -> None:
    """Hugging Face's shuffle buffer: the resume says how many samples are lost. Without a buffer it is exact."""
    first, again = Ranks(shuffled(seed=1, buffer_size=4), 2), Ranks(shuffled(seed=1, buffer_size=4), 2)
    first.draw(3)
    with pytest.warns(DataReplayWarning, match="its shuffle buffer of 4 samples.* up to 4 samples of each reader"):
        again.resume(first)
    again.draw(1)

    make = shuffled(seed=1, buffer_size=1)
    whole, first, again = Ranks(make, 2).draw(9), Ranks(make, 2), Ranks(make, 2)
    seen = first.draw(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataReplayWarning)
        again.resume(first)
        assert [a + b for a, b in zip(seen, again.draw(6), strict=True)] == whole


def test_a_state_that_hugging_face_cannot_load_is_not_used() -> None:
    """Of a shuffled stream in workers. The samples are drawn again, buffer and all."""
    make = shuffled(seed=1, buffer_size=4)
    whole, first, again = Ranks(make, 2, 2).draw(7), Ranks(make, 2, 2), Ranks(make, 2, 2)
    seen = first.draw(3)
    again.resume(first)
    with pytest.warns(DataReplayWarning, match="the run reads 9 samples again"):
        assert [a + b for a, b in zip(seen, again.draw(4), strict=True)] == whole


def test_a_shuffle_without_a_seed_is_refused_at_the_resume() -> None:
    """It shuffles in another way in every process. The ranks of a run compare it too."""
    first, again = Ranks(shuffled(), 1), Ranks(shuffled(), 1)
    first.draw(3)
    with pytest.raises(ValueError, match=r"shuffled in another way than in the saved run.* `dataset\.shuffle\(seed="):
        again.resume(first)


def test_data_that_the_script_has_split_is_not_split_again() -> None:
    """`split_dataset_by_node` without `per_rank`: the ranks read different samples of one place, which is refused."""

    def make(rank: int, world_size: int, num_workers: int) -> Any:
        table = streams.hugging_face_table().to_iterable_dataset(num_shards=6)
        split = importlib.import_module("datasets.distributed").split_dataset_by_node(table, rank, world_size)
        return DataLoader(split, batch_size=BATCH, num_workers=num_workers)

    feeds = Ranks(make, 2).feeds
    for feed in feeds:
        with feed:
            feed.start()
            next(feed)
    assert feeds[0].checksum != feeds[1].checksum


@pytest.mark.filterwarnings("ignore::trainloop.DataReplayWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_little_data_goes_on_inside_its_last_batch(num_workers: int) -> None:
    """Kill after each of the batches of epochs that are shorter than a batch or two."""

    class Little(StatefulStream):
        def __init__(self) -> None:
            super().__init__()
            self.n = 7

    def make(rank: int, world_size: int, num_workers: int) -> Any:
        return DataLoader(Little(), batch_size=batch_size, num_workers=num_workers)

    for batch_size, kill_points in [(3, [2])] if num_workers else [(3, range(1, 8)), (9, [2])]:
        whole = Ranks(make, 2, num_workers).draw(8)
        for killed_at in kill_points:
            first, again = Ranks(make, 2, num_workers), Ranks(make, 2, num_workers)
            seen = first.draw(killed_at)
            again.resume(first)
            rest = again.draw(8 - killed_at)
            assert [a + b for a, b in zip(seen, rest, strict=True)] == whole, (batch_size, killed_at)


def test_a_position_is_kept_if_a_run_is_saved_before_it_draws() -> None:
    """A resumed run that saves before its first step, as a hook may ask."""
    first = Ranks(KINDS["stream with a state"], 1)
    seen = samples(first.draw(3))
    second, third = Ranks(KINDS["stream with a state"], 1), Ranks(KINDS["stream with a state"], 1)
    second.resume(first)
    with second.feeds[0] as feed:
        feed.start()
        third.resume(second)
    assert sorted(seen + samples(third.draw(4)))[:28] == sorted(set(seen + samples(first.draw(4))))


def test_a_position_of_a_bare_iterable_of_an_older_version_is_understood() -> None:
    """Trainloop 0.1.0 took it for each rank's own."""
    (feed,) = Ranks(KINDS["bare iterable of batches"], 1).feeds
    state = {"kind": "IterableSource", "epoch": 1, "position": 2, "world_size": 1}
    feed.load_state_dict(state, {"epoch": 1, "position": 2, "iterable": None, "epoch_rng": None})
    with pytest.warns(DataReplayWarning, match="the run reads 2 batches again"):
        (batch,) = drain(feed, 1)
    assert batch.tolist() == [6, 7, 8]


# ---------------------------------------------------------------------- torchdata


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # of torchdata, with a new torch
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_of_map_style_data_is_taken_for_a_plain_one(num_workers: int) -> None:
    """torchdata's: sharded here, and resumed at another number of ranks."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", exc_type=ImportError)

    def make(rank: int, world_size: int, num_workers: int) -> Any:
        return torchdata.StatefulDataLoader(Numbers(), BATCH, shuffle=True, num_workers=num_workers)

    first, other = Ranks(make, 2, num_workers), Ranks(make, 3, num_workers)
    seen = samples(first.draw(2))
    other.resume(first)
    found = epochs(seen + samples(other.draw(4)))
    assert [sorted(epoch) for epoch in found] == [list(range(N))] * 2
    assert found[0] != found[1]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # of torchdata, with a new torch
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_of_a_stream_is_each_ranks_own(num_workers: int) -> None:
    """torchdata's, with `per_rank`: the resume asks for its state, that of its workers included."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", exc_type=ImportError)

    def plain(rank: int, world_size: int, num_workers: int) -> Any:
        return torchdata.StatefulDataLoader(Stream(), BATCH, num_workers=num_workers)

    def own(*args: int) -> Any:
        return per_rank(plain(*args))

    whole = Ranks(own, 2, num_workers).draw(12)
    first, again = Ranks(own, 2, num_workers), Ranks(own, 2, num_workers)
    seen = first.draw(5)
    again.resume(first)
    assert [a + b for a, b in zip(seen, again.draw(7), strict=True)] == whole
