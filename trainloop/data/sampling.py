"""Decides which samples each rank takes and when: the endless order of a map-style data set, and the position in it.

```
order(epoch 0) + order(epoch 1) + …        f(seed, epoch), the same on all ranks
└── global batch ──┘└── global batch ──┘   world size x batch size consecutive samples
└ rank 0 ┘└ rank 1 ┘                       rank r takes the r-th slice
```

A batch may begin in one epoch and end in the next. All ranks always have equally many samples. In an epoch, no sample
is repeated and none is left out, except for the tail of each epoch with `drop_last`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from ..rng import derived_seed, seed_all
from .bad_samples import NUM_SUBSTITUTES, Candidates, SkipBadSamples
from .order import DatasetOrder, EpochOrdered, Order, count_batches, length_of


def sampling_of(loader: DataLoader[Any]) -> tuple[Iterable[Any], int | None, bool]:
    """How a user's loader samples: the sampler of its items, the batch size, and whether the tail is dropped.

    A batch size of None means that each item is a whole batch. The item is a list from a custom batch sampler, or the
    index of a batch in the data set itself.
    """
    batch_sampler = loader.batch_sampler
    if isinstance(batch_sampler, BatchSamplerShard):  # Accelerate's wrapper around the user's
        batch_sampler = batch_sampler.batch_sampler
    sampler: Any
    if batch_sampler is None:  # no automatic batching: each item is a batch of the data set
        sampler, batch_size, drop_last = loader.sampler, None, False
    elif isinstance(batch_sampler, BatchSampler) and _is_known(batch_sampler, BatchSampler):
        sampler, batch_size, drop_last = batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    else:
        return batch_sampler, None, False
    if _is_known(sampler, DistributedSampler):  # it shards; we shard below instead, for any number of processes
        sampler = (RandomSampler if sampler.shuffle else SequentialSampler)(loader.dataset)  # type: ignore[arg-type]
    dataset = loader.dataset.dataset if isinstance(loader.dataset, SkipBadSamples) else loader.dataset
    if isinstance(dataset, EpochOrdered) and not getattr(sampler, "replacement", False):
        shuffles = _is_known(sampler, RandomSampler)
        if (shuffles or _is_known(sampler, SequentialSampler)) and len(sampler) == len(dataset):
            sampler = DatasetOrder(dataset, shuffles)
    return sampler, batch_size, drop_last


def is_of_torchdata(value: Any) -> bool:
    """Whether `value` is a `StatefulDataLoader`, or a sampler that one has made."""
    return type(value).__module__.startswith("torchdata.stateful_dataloader.")


def _is_known(sampler: Any, cls: type) -> bool:
    return type(sampler) is cls or (isinstance(sampler, cls) and is_of_torchdata(sampler))


class _Piece(NamedTuple):
    """Consecutive items of one epoch."""

    order: Order
    epoch: int
    start: int
    num_items: int


class EndlessSampler:
    """The sampler of one rank's loader: endless batches, from a position on.

    Args:
        sampler: Yields the items of one epoch, in order.
        batch_size: Items a batch. None: one item, which is yielded without a list around it.
        drop_last: Leave out the tail of each epoch that doesn't fill a global batch.
        seed: Seed of the order.
        rank: This rank.
        world_size: Number of ranks.
        key: Converts (seed, epoch, item) to the yielded value. None: the item is yielded.
        holds_batches: Each item is the list of a batch's indices. The position counts these indices.
        with_substitutes: Each index is yielded with those that follow it in the order, as `Candidates`.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        batch_size: int | None,
        drop_last: bool,
        *,
        seed: int,
        rank: int,
        world_size: int,
        key: Callable[[int, int, Any], Any] | None = None,
        holds_batches: bool = False,
        with_substitutes: bool = False,
    ) -> None:
        self.seed = seed
        self.epoch = 0
        """Epoch of the next sample."""
        self.position = 0
        """Number of samples of that epoch that all ranks together have consumed."""
        self.checksum = 0
        """Checksum of the order of that epoch. 0 before the first batch."""
        self.ends_epoch = False
        """Whether the batch that was consumed last is the last one of that epoch."""
        self._sampler, self._drop_last, self._key = sampler, drop_last, key
        self._holds_batches, self._is_single = holds_batches, batch_size is None
        self._with_substitutes = with_substitutes
        self._rank, self._size = rank, batch_size or 1
        self._global_batch = self._size * world_size
        self._min_left = self._global_batch if drop_last else 1  # items needed for another batch in the epoch
        self._ahead: deque[tuple[int, int, int, bool]] = deque()
        self._orders: dict[int, Order] = {}
        self._max_items: int | None = None  # limit of an epoch; all epochs are then the same

    def repeat_first(self, num_batches: int) -> None:
        """Let each epoch be the first batches of the first epoch. `num_batches` counts batches of one process."""
        self._max_items = num_batches * self._size
        self._drop_last, self._min_left = False, 1  # there may be fewer than a global batch

    def __iter__(self) -> Iterator[Any]:
        """Batches from the current position on. The position moves only with `advance`, because workers draw ahead."""
        self._ahead.clear()
        for pieces, position in self._global_batches():
            self._ahead.append(position)
            yield self._own(pieces, self._rank)

    def first_of_rank_zero(self) -> Any:
        """The next item of rank 0, on every rank."""
        pieces, _ = next(self._global_batches())
        return self._own(pieces, 0)

    def _global_batches(self) -> Iterator[tuple[list[_Piece], tuple[int, int, int, bool]]]:
        """The pieces of each global batch. Also the epoch, position, checksum and end of the epoch after it."""
        epoch, position = self.epoch, self.position
        pieces: list[_Piece] = []
        num_drawn = 0
        while True:
            order = self.order(epoch)
            index, rest = self._seek(order, position)
            if rest is not None:
                pieces, num_drawn, position = [_Piece(rest, epoch, 0, 1)], 1, position + len(rest.items(0, 1)[0])
            while True:
                if num_drawn == self._global_batch:
                    ends_epoch = order.count(index, self._min_left) < self._min_left
                    yield pieces, (epoch, position, order.checksum, ends_epoch)
                    pieces, num_drawn = [], 0
                count = order.count(index, self._global_batch - num_drawn)
                if not count:
                    break
                pieces.append(_Piece(order, epoch, index, count))
                position += sum(map(len, order.items(index, index + count))) if self._holds_batches else count
                index, num_drawn = index + count, num_drawn + count
            if position == 0:
                raise ValueError("The data loader has no samples.")
            if self._drop_last:
                if position < self._global_batch:
                    raise ValueError(
                        f"The data set gives {position} samples an epoch, but `drop_last=True` drops what doesn't fill"
                        f" a global batch of {self._global_batch}. Make the batch smaller or keep the rest."
                    )
                pieces, num_drawn = [], 0
            epoch, position = epoch + 1, 0

    def advance(self) -> None:
        """Move the position past the oldest drawn batch, which has been consumed."""
        epoch, self.position, self.checksum, self.ends_epoch = self._ahead.popleft()
        if epoch != self.epoch:
            self.epoch = epoch
            self._orders = {number: order for number, order in self._orders.items() if number >= epoch}

    def order(self, epoch: int) -> Order:
        """The order of an epoch. It is kept until the epoch ends, because a sampler might not repeat it."""
        if epoch not in self._orders:
            max_items = self._max_items
            first = epoch if max_items is None else 0
            self._orders[epoch] = Order(self._sampler, self.seed, first, max_items)
        return self._orders[epoch]

    def go_to(self, seed: int, epoch: int, position: int) -> None:
        """Go to a saved position."""
        self.seed, self.epoch, self.position = seed, epoch, position
        self.ends_epoch, self._orders = False, {}

    def num_batches_left(self, num_epochs: int) -> int | None:
        """Number of global batches from the current position to the end of `num_epochs` epochs. None: no length."""
        index = self.position
        if self._holds_batches and self.position:
            index, rest = self._seek(self.order(self.epoch), self.position)
            index -= rest is not None
        length = length_of(self._sampler)
        if self._max_items is not None:
            length = self.order(self.epoch).length
        return count_batches(num_epochs - self.epoch, length, index, self._global_batch, self._drop_last)

    def num_samples(self, epoch: int, num_items: int) -> int:
        """Number of samples in the first `num_items` items of an epoch."""
        if not self._holds_batches:
            return num_items
        order = self.order(epoch)
        return sum(map(len, order.items(0, order.count(0, num_items))))

    def _seek(self, order: Order, position: int) -> tuple[int, Order | None]:
        """The first item that was not consumed; and before it, the rest of one that was partly consumed, or None."""
        if not self._holds_batches:
            return position, None
        index = num_seen = 0
        while num_seen < position and order.count(index, 1):
            (batch,) = order.items(index, index + 1)
            index, num_seen = index + 1, num_seen + len(batch)
        return index, Order([batch[position - num_seen :]], 0, 0) if num_seen > position else None

    def _own(self, pieces: list[_Piece], rank: int) -> Any:
        """A rank's slice of a global batch."""
        own: Any = []
        offset = 0
        for order, epoch, first, num_items in pieces:
            start, stop = max(rank * self._size - offset, 0), min((rank + 1) * self._size - offset, num_items)
            if start < stop:
                items = order.items(first + start, first + stop)
                if self._with_substitutes:
                    items = _candidates(order, first + start, first + stop, self._holds_batches)
                items = items if self._key is None else [self._key(self.seed, epoch, item) for item in items]
                own = [*own, *items] if own else items
            offset += num_items
        return own[0] if self._is_single else own


def _candidates(order: Order, start: int, stop: int, holds_batches: bool) -> list[Any]:
    """The items from `start` to `stop`; each index comes with those that follow it. The order wraps at its end."""
    num_after = order.count(stop, NUM_SUBSTITUTES)
    items = [*order.items(start, stop + num_after), *order.items(0, order.count(0, NUM_SUBSTITUTES - num_after))]
    flat = [index for batch in items for index in batch] if holds_batches else items
    found = [Candidates(index, tuple(flat[i + 1 : i + 1 + NUM_SUBSTITUTES])) for i, index in enumerate(flat)]
    if not holds_batches:
        return found[: stop - start]
    left = iter(found)
    return [[*itertools.islice(left, len(batch))] for batch in items[: stop - start]]


def sample_key(seed: int, epoch: int, index: Any) -> tuple[int, int, Any]:
    """The key of a sample in `SeededDataset`."""
    return seed, epoch, index


def batch_keys(seed: int, epoch: int, indices: Iterable[Any]) -> list[tuple[int, int, Any]]:
    """The keys in `SeededDataset` of a batch from a batch sampler."""
    return [(seed, epoch, index) for index in indices]


class SeededDataset(Dataset[Any]):
    """A data set whose random augmentation depends only on the sample and the epoch, not on the worker.

    Its keys are (seed, epoch, index). The generators keep the state after the last sample, so that a random collate
    function is reproducible too.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int, Any]) -> Any:
        seed, epoch, index = key
        seed_all(derived_seed(seed, epoch, index.first if isinstance(index, Candidates) else index))
        return self.dataset[index]

    def __getitems__(self, keys: list[tuple[int, int, Any]]) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return [self[key] for key in keys]
        seed_all(derived_seed(*keys[0]))
        return fetch([key[2] for key in keys])
