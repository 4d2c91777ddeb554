"""The batches of one evaluation: which rank takes which, such that each counts once.

Whole batches go to the ranks, so a batch is the same one at any number of processes. Where the last round has none left
for a rank, the rank runs one again that does not count: under FSDP2 and DDP every forward pass is a collective.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..data.checksums import checksum, sample_checksum
from ..data.feed import check_same_data, transfer
from ..data.iterable import set_epoch
from ..data.loaders import is_map_style, with_sampler
from ..data.order import Order
from ..data.per_rank import PerRank
from ..data.sampling import batch_keys, sample_key, sampling_of
from ..data.workers import end_workers, start_iterator
from ..errors import describe
from ..ranks import collectives
from ..rng import OwnRng, derived_seed, seed_all

_compared: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()
"""Loaders whose samples were found to be the same on all ranks."""


class EvaluationBatches:
    """This rank's batches of one pass, as many on each rank: pairs of the batch's number and the batch, on the device,
    with the number of samples in it (-1: to be counted; None: it does not count). Iterate it on every rank.

    Args:
        data: A `DataLoader` of a map-style data set, of which each rank fetches its batches only; what `per_rank`
            returned, which each rank iterates for itself; or any other iterable of batches, which each rank reads
            whole. One that Accelerate has prepared is taken apart again.
        seed: Of the order, and of random transforms.
        device: Where the batches go.

    Raises:
        TypeError: `data` is not an iterable of batches.
        ValueError: It shards itself in a way that repeats samples.
        RankDisagreementError: It is not the same on all ranks.
    """

    def __init__(self, data: Any, seed: int, device: torch.device) -> None:
        if not hasattr(data, "__iter__") or isinstance(data, str | bytes):
            raise TypeError(
                "The evaluation data must be a DataLoader or another iterable of batches, or a mapping from names to"
                f" such, but is {describe(data)}."
            )
        self._shards_itself = isinstance(data, PerRank)
        if isinstance(data, PerRank):
            data = data.loader
        self._data, self._seed, self._device = data, seed, device
        self._rank, self._world_size = collectives.rank(), collectives.world_size()
        self._transfer = transfer(data, device) or (lambda batch: batch)
        is_prepared = isinstance(data, DataLoaderShard | DataLoaderDispatcher)
        self._items: list[Any] | None = None
        if self._shards_itself:
            pass
        elif is_map_style(data) or (is_prepared and not isinstance(data.dataset, IterableDataset)):
            self._items = _items(data, seed)
            check_same_data(collectives.gather_objects(checksum(self._items)))
        elif self._world_size > 1 and is_prepared:
            raise ValueError(
                "The evaluation data is an IterableDataset in a loader that Accelerate has prepared: it repeats samples"
                " to make the ranks equal. Return the plain loader; it is sharded so that each sample counts once."
            )
        self.num_rounds = -(-len(self._items) // self._world_size) if self._items is not None else None
        """None: not known before the end."""

    def __iter__(self) -> Iterator[tuple[int, Any, int | None]]:
        num_batches = 0
        if self._shards_itself:
            batches = self._by_rank()
        else:
            batches = self._by_reading() if self._items is None else self._by_index()
        for index, batch, num_samples in batches:
            num_batches += 1
            yield index, self._transfer(batch), num_samples
        if not num_batches:
            raise ValueError("The evaluation data gave no batch. If it can be iterated once only, return a DataLoader.")

    def _by_index(self) -> Iterator[tuple[int, Any, int | None]]:
        items = self._items
        assert items is not None
        mine = list(range(self._rank, len(items), self._world_size))
        padding = [0] * ((self.num_rounds or 0) - len(mine))
        loader: DataLoader[Any] = self._data
        # The first batch, twice: a data set that draws from generators of its own gives another one each time.
        compared = [0, 0] if self._world_size > 1 and items and loader not in _compared else []
        sampler = [items[i] for i in [*compared, *mine, *padding]]
        if loader.num_workers > 0:
            key = sample_key if loader.batch_sampler is None else batch_keys
            sampler = [key(self._seed, 0, item) for item in sampler]
        iterator = start_iterator(with_sampler(loader, sampler, self._seed))
        try:
            if compared:
                found = []
                for i in compared:
                    seed_for(self._device, self._seed, "fetch", i)
                    found.append(sample_checksum([next(iterator)]))
                check_same_data(collectives.gather_objects(found[0] if found[0] == found[1] else None))
                _compared.add(loader)
            for i, is_counted in [*((i, True) for i in mine), *((i, False) for i in padding)]:
                seed_for(self._device, self._seed, "fetch", i)
                batch = next(iterator)
                num_samples = -1 if loader.batch_sampler is None else len(items[i])
                yield i, batch, num_samples if is_counted else None
        finally:
            end_workers(iterator)

    def _by_reading(self) -> Iterator[tuple[int, Any, int | None]]:
        first = mine = None
        i, seen = -1, 0
        rng = OwnRng(derived_seed("evaluation", self._seed, "read"))  # all ranks read the same
        with rng.lent():
            batches = start_iterator(self._data)
        for i in itertools.count():
            with rng.lent():
                batch = next(batches, _END)
            if self._world_size > 1 and i <= 1:  # before the ranks wait for one another in a forward pass
                check_same_data(collectives.gather_objects(-1 if batch is _END else sample_checksum([batch])))
            if batch is _END:
                break
            seen = sample_checksum([seen, batch]) if self._world_size > 1 else 0
            first = batch if i == 0 else first
            if i % self._world_size == self._rank:
                mine = i, batch, -1
            if (i + 1) % self._world_size == 0:
                assert mine is not None
                yield mine
                mine = None
        if i % self._world_size:
            yield mine or (0, first, None)
        check_same_data(collectives.gather_objects(sample_checksum([seen, i])))

    def _by_rank(self) -> Iterator[tuple[int, Any, int | None]]:
        set_epoch(self._data, 0)
        seed_for(self._device, self._seed, "read", self._rank)
        rng = OwnRng(derived_seed("evaluation", self._seed, "read", self._rank))
        with rng.lent():
            batches = start_iterator(self._data)
        first = None
        for i in itertools.count():
            with rng.lent():
                batch = next(batches, _END)
            # How many batches the others have is not known before they end.
            are_left = collectives.gather_objects(batch is not _END)
            if not any(are_left):
                return
            if i == 0 and not all(are_left):
                empty = [rank for rank, is_left in enumerate(are_left) if not is_left]
                raise ValueError(f"The evaluation data gave no batch on ranks {empty}. Each rank needs one at least.")
            first = batch if i == 0 else first
            index = i * self._world_size + self._rank
            yield (index, first, None) if batch is _END else (index, batch, -1)


_END = object()


def _items(loader: DataLoader[Any], seed: int) -> list[Any]:
    """What the loader fetches its batches by, in their order."""
    sampler, batch_size, drop_last = sampling_of(loader)
    indices = Order(sampler, seed, 0).all_items()
    if batch_size is None:
        return list(indices)
    return list(BatchSampler(indices, batch_size, drop_last))


def seed_for(device: torch.device, *parts: Any) -> None:
    """Seed the generators: noise that is the same for a batch at every evaluation, at any number of processes."""
    seed = derived_seed("evaluation", *parts)
    seed_all(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
