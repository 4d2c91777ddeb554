"""Which samples each rank takes, and when: the endless order of a map-style data set, and where a run stands in it.

```
order(epoch 0) + order(epoch 1) + …        f(seed, epoch), the same on all ranks
└── global batch ──┘└── global batch ──┘   world size x batch size consecutive samples
└ rank 0 ┘└ rank 1 ┘                       rank r takes the r-th slice
```

A batch may begin in one epoch and end in the next: all ranks always have equally many samples, none is seen twice in an
epoch and none is left out (but for the tail of each epoch with `drop_last`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from ..rng import derived_seed, lent_rng, seed_all


def sampling_of(loader: DataLoader[Any]) -> tuple[Iterable[Any], int | None, bool]:
    """How a user's loader samples: what orders its items, how many make a batch, and whether a tail is dropped.

    A batch size of None: each item is all that a batch needs, the list of a batch sampler of another kind than torch's,
    or the index of what the data set itself calls a batch.
    """
    batch_sampler = loader.batch_sampler
    if isinstance(batch_sampler, BatchSamplerShard):  # Accelerate's, around the user's
        batch_sampler = batch_sampler.batch_sampler
    sampler: Any
    if batch_sampler is None:  # no automatic batching: each item is what the data set calls a batch
        sampler, batch_size, drop_last = loader.sampler, None, False
    elif type(batch_sampler) is BatchSampler:
        sampler, batch_size, drop_last = batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    else:
        return batch_sampler, None, False
    if type(sampler) is DistributedSampler:  # it shards; here that is done below, for any number of processes
        sampler = (RandomSampler if sampler.shuffle else SequentialSampler)(loader.dataset)  # type: ignore[arg-type]
    return sampler, batch_size, drop_last


def order(sampler: Iterable[Any], seed: int, epoch: int) -> Iterable[Any]:
    """The items of one epoch, the same on every rank and after every restart.

    A sampler without a length may have no end: it is iterated as it goes, and repeats itself only if it draws from a
    generator of its own.
    """
    if isinstance(sampler, range):
        return sampler
    if type(sampler) is SequentialSampler:
        return range(len(sampler))
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    generator = getattr(sampler, "generator", None)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(derived_seed(seed, epoch))
    try:
        len(sampler)  # type: ignore[arg-type]
    except TypeError:
        return sampler
    with lent_rng(derived_seed(seed, epoch)):
        return list(sampler)


class EndlessSampler:
    """What one rank's loader samples by: batches without end, from a position on.

    Args:
        sampler: Orders the items of one epoch.
        batch_size: Items a batch; None: one, and it is yielded without a list around it.
        drop_last: Leave out the tail of each epoch that doesn't fill a global batch.
        seed: Of the order.
        rank: This rank.
        world_size: Number of ranks.
        key: Makes of (seed, epoch, item) what is yielded for an item. None: the item.
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
    ) -> None:
        self.seed = seed
        self.epoch = 0
        """Epoch of the item that comes next."""
        self.position = 0
        """Items of that epoch that were consumed, by all ranks together."""
        self._sampler, self._drop_last, self._key = sampler, drop_last, key
        size = batch_size or 1
        self._global_batch = size * world_size
        self._part: slice | int = rank if batch_size is None else slice(rank * size, (rank + 1) * size)
        self._ahead: deque[tuple[int, int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        """Batches from the current position on. The position itself moves with `advance` only: workers draw ahead."""
        self._ahead.clear()
        epoch, position = self.epoch, self.position
        batch: list[Any] = []
        while True:
            items = itertools.islice(order(self._sampler, self.seed, epoch), position, None)
            while drawn := list(itertools.islice(items, self._global_batch - len(batch))):
                position += len(drawn)
                batch += drawn if self._key is None else [self._key(self.seed, epoch, item) for item in drawn]
                if len(batch) == self._global_batch:
                    self._ahead.append((epoch, position))
                    yield batch[self._part]
                    batch = []
            if position == 0:
                raise ValueError("The data loader has no samples.")
            if self._drop_last:
                if position < self._global_batch:
                    raise ValueError(
                        f"The data set gives {position} samples an epoch, but `drop_last=True` drops what doesn't fill"
                        f" a global batch of {self._global_batch}. Make the batch smaller or keep the rest."
                    )
                batch = []
            epoch, position = epoch + 1, 0

    def advance(self) -> None:
        """The oldest batch that was drawn has been consumed."""
        self.epoch, self.position = self._ahead.popleft()


def sample_key(seed: int, epoch: int, index: Any) -> tuple[int, int, Any]:
    """What `SeededDataset` finds a sample by."""
    return seed, epoch, index


def batch_keys(seed: int, epoch: int, indices: Iterable[Any]) -> list[tuple[int, int, Any]]:
    """What `SeededDataset` finds the samples of a batch sampler's batch by."""
    return [(seed, epoch, index) for index in indices]


class SeededDataset(Dataset[Any]):
    """A data set whose random augmentation depends on the sample and the epoch only, not on which worker serves it.

    Its keys are (seed, epoch, index). The generators keep the last sample's state, so that a random collate function
    repeats itself too.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int, Any]) -> Any:
        seed_all(derived_seed(*key))
        return self.dataset[key[2]]

    def __getitems__(self, keys: list[tuple[int, int, Any]]) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return [self[key] for key in keys]
        seed_all(derived_seed(*keys[0]))
        return fetch([key[2] for key in keys])

    def __getattr__(self, name: str) -> Any:
        # A `worker_init_fn` finds what it expects at `get_worker_info().dataset`.
        if name == "dataset":
            raise AttributeError(name)  # while it is unpickled
        return getattr(self.dataset, name)
