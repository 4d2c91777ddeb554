"""The batches of one evaluation: distributes them over the ranks so that each counts once.

Each batch goes to one rank as a whole, so batches are the same at any number of processes. If a rank has no batch left
in the last round, it repeats one that doesn't count: under FSDP2 and DDP every forward pass is a collective.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import find_batch_size
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..data.checksums import checksum, sample_checksum
from ..data.feed import check_same_data, transfer
from ..data.iterable import set_epoch
from ..data.loaders import is_map_style, with_sampler
from ..data.order import Order
from ..data.per_rank import PerRank
from ..data.sampling import batch_keys, sample_key, sampling_of
from ..data.shares import UNSEEDED, shuffle_checksum
from ..data.workers import end_workers, start_iterator
from ..errors import describe
from ..ranks import collectives
from ..records import map_nested_tensor
from ..rng import OwnRng, derived_seed, seed_all
from .guard import Gap
from .shares import share_loader

_compared: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()
"""Loaders whose samples have been found to be the same on all ranks."""


@dataclass(frozen=True)
class Round:
    """The batch of one rank in a round. In a round every rank runs one batch."""

    index: int
    """The batch's number in the data."""
    batch: Any
    num_samples: int | None
    """-1: still to be counted. None: the batch doesn't count."""
    gap: Gap
    """What differs between the ranks in this round."""

    @property
    def is_counted(self) -> bool:
        return self.num_samples is not None


class _Ranks(NamedTuple):
    """A round, compared over all ranks."""

    is_any_left: bool
    """Whether any rank has a batch that counts."""
    is_any_empty: bool
    """Whether any rank has no batch at all."""
    gap: Gap


class EvaluationBatches:
    """This rank's batches of one pass, on the device. Every rank gets the same number. Iterate on every rank.

    Args:
        data: A `DataLoader` of a map-style data set: each rank fetches only its own batches. Or the result of
            `per_rank`: each rank iterates its own. Or a stream that gives shares: each rank reads its share. Or another
            iterable of batches: each rank reads all of it. A loader that Accelerate has prepared is unwrapped.
        seed: Seed of the order and of random transforms.
        device: The device for the batches.
        limit: Limit of batches, over all ranks together. None: all batches.
        keeps_order: Whether the batches must be numbered in the order of the data. Then no shares are read.

    Raises:
        TypeError: `data` is not an iterable of batches.
        ValueError: It shards itself in a way that repeats samples.
        RankDisagreementError: It differs between the ranks.
    """

    def __init__(
        self, data: Any, seed: int, device: torch.device, limit: int | None = None, *, keeps_order: bool = False
    ) -> None:
        if not hasattr(data, "__iter__") or isinstance(data, str | bytes):
            raise TypeError(
                "The evaluation data must be a DataLoader or another iterable of batches, or a mapping from names to"
                f" such, but is {describe(data)}."
            )
        self._shards_itself = isinstance(data, PerRank)
        self._share: Any = None
        """This rank's share of a stream that gives shares. None: it gives none."""
        if isinstance(data, PerRank):
            data = data.loader
        self._data, self._seed, self._device, self._limit = data, seed, device, limit
        self._rank, self._world_size = collectives.rank(), collectives.world_size()
        self._transfer = transfer(data, device) or (lambda batch: batch)
        is_prepared = isinstance(data, DataLoaderShard | DataLoaderDispatcher)
        self._items: list[Any] | None = None
        if self._shards_itself:
            pass
        elif is_map_style(data) or (is_prepared and not isinstance(data.dataset, IterableDataset)):
            self._items = _items(data, seed)[:limit]
            check_same_data(checksum(self._items))
        elif self._world_size > 1 and is_prepared:
            raise ValueError(
                "The evaluation data is an IterableDataset in a loader that Accelerate has prepared: it repeats samples"
                " to make the ranks equal. Return the plain loader; it is sharded so that each sample counts once."
            )
        elif self._world_size > 1 and not keeps_order:
            share = share_loader(data, self._rank, self._world_size)
            own = None if share is None else shuffle_checksum(getattr(share, "dataset", share))
            self._share = share if check_same_data(own, UNSEEDED) else None
        self.num_rounds = -(-len(self._items) // self._world_size) if self._items is not None else None
        """None: unknown before the end."""

    def __iter__(self) -> Iterator[Round]:
        num_batches = 0
        if self._shards_itself:
            set_epoch(self._data, 0)
            batches = self._by_rank(self._data, "read", self._rank)
        elif self._share is not None:
            batches = self._by_rank(self._share, "read")  # one seed for all ranks, so one order to share
        else:
            batches = self._by_reading() if self._items is None else self._by_index()
        for one in batches:
            num_batches += 1
            yield replace(one, batch=self._transfer(one.batch))
        if not num_batches:
            raise ValueError("The evaluation data gave no batch. If it can be iterated once only, return a DataLoader.")

    def _by_index(self) -> Iterator[Round]:
        items = self._items
        assert items is not None
        mine = list(range(self._rank, len(items), self._world_size))
        padding = [0] * ((self.num_rounds or 0) - len(mine))
        loader: DataLoader[Any] = self._data
        # The first batch, twice: a data set with its own random generators gives another one each time.
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
                check_same_data(found[0] if found[0] == found[1] else None)
                _compared.add(loader)
            has_sizes = loader.batch_sampler is not None
            for number, i in enumerate([*mine, *padding]):
                seed_for(self._device, self._seed, "fetch", i)
                batch = next(iterator)
                is_left = number < len(mine)
                if has_sizes:
                    begin = number * self._world_size
                    together = items[begin : begin + self._world_size]
                    gap = self._gap([len(item) for item in together], self._world_size - len(together))
                else:
                    gap = self._compare(batch, is_left).gap
                num_samples = len(items[i]) if has_sizes else -1
                yield Round(i, batch, num_samples if is_left else None, gap)
        finally:
            end_workers(iterator)

    def _by_reading(self) -> Iterator[Round]:
        first: Any = None
        mine: tuple[int, Any, int | None] | None = None
        i, seen = -1, 0
        sizes: list[int] = []
        rng = OwnRng(derived_seed("evaluation", self._seed, "read"))  # so that all ranks read the same
        with rng.lent():
            batches = start_iterator(self._data)
        for i in itertools.count():
            with rng.lent():
                batch = next(batches, _END) if self._limit is None or i < self._limit else _END
            if self._world_size > 1 and i <= 1:  # before a forward pass, in which ranks could wait forever
                check_same_data(-1 if batch is _END else sample_checksum([batch]))
            if batch is _END:
                break
            seen = sample_checksum([seen, batch]) if self._world_size > 1 else 0
            first = batch if i == 0 else first
            sizes.append(_size(batch))
            if i % self._world_size == self._rank:
                mine = i, batch, -1
            if (i + 1) % self._world_size == 0:
                assert mine is not None
                yield Round(*mine, self._gap(sizes, 0))
                mine, sizes = None, []
        if i % self._world_size:
            yield Round(*(mine or (0, first, None)), "padding")
        check_same_data(sample_checksum([seen, i]))

    def _by_rank(self, data: Any, *seed: Any) -> Iterator[Round]:
        """Iterate this rank's own data, with random generators that are seeded by `seed`."""
        seed_for(self._device, self._seed, *seed)
        rng = OwnRng(derived_seed("evaluation", self._seed, *seed))
        with rng.lent():
            batches = start_iterator(data)
        first = None
        for i in itertools.count():
            index = i * self._world_size + self._rank
            is_within = self._limit is None or index < self._limit
            with rng.lent():
                batch = next(batches, _END) if is_within or i == 0 else _END
            first = batch if i == 0 else first
            is_left = batch is not _END and is_within
            ranks = self._compare(batch, is_left)  # nobody knows how many batches the others have before they end
            if i == 0 and ranks.is_any_empty:
                have_batch = collectives.gather_objects(batch is not _END)
                found = have_batch.index(True) if any(have_batch) else None
                if found is None:
                    return
                # A rank that never had a batch runs another rank's first batch, which doesn't count.
                lent = map_nested_tensor(torch.Tensor.cpu, batch) if found == self._rank else None
                lent = collectives.gather_objects(lent)[found]
                first = lent if batch is _END else first
            if not ranks.is_any_left:
                return
            yield Round(index, batch, -1, ranks.gap) if is_left else Round(index, first, None, ranks.gap)

    def _compare(self, batch: Any, is_left: bool) -> _Ranks:
        """Compare a round over all ranks. This rank's `batch` counts if `is_left`. Call on every rank."""
        size = _size(batch)
        found = collectives.start_max([is_left, not is_left, batch is _END, size, -size])()
        is_any_left, is_any_without, is_any_empty, largest, minus_smallest = found
        gap = self._gap([largest, -minus_smallest], is_any_without)
        return _Ranks(bool(is_any_left), bool(is_any_empty), gap)

    def _gap(self, sizes: Sequence[int], num_without: int) -> Gap:
        """What differs in a round with batches of these sizes, if `num_without` ranks have none."""
        if self._world_size == 1:
            return ""
        return "padding" if num_without else "sizes" if len(set(sizes)) > 1 else ""


_END = object()


def _size(batch: Any) -> int:
    """Number of samples in a batch. -1: it doesn't begin with a tensor, or there is no batch."""
    try:
        return int(find_batch_size(batch))
    except (TypeError, ValueError, IndexError):
        return -1


def _items(loader: DataLoader[Any], seed: int) -> list[Any]:
    """The keys by which the loader fetches its batches, in their order."""
    sampler, batch_size, drop_last = sampling_of(loader)
    indices = Order(sampler, seed, 0).all_items()
    if batch_size is None:
        return list(indices)
    return list(BatchSampler(indices, batch_size, drop_last))


def seed_for(device: torch.device, *parts: Any) -> None:
    """Seed the generators, so that a batch gets the same noise at every evaluation and number of processes."""
    seed = derived_seed("evaluation", *parts)
    seed_all(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
