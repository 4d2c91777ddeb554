"""The order of one epoch: the items of a sampler, the same on every rank and after every restart.

A sampler draws its order from the process's generators, which are seeded for it with (seed, epoch), or from its own
generators, which are found and seeded. Other sources of randomness can't be seen. So each order has a checksum: the
ranks compare theirs, and a resumed run compares its order with the saved one.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from ..rng import OwnRng, derived_seed, lent_rng
from .checksums import checksum

_NUM_COMPARED = 64  # first items that are compared if a sampler has no length
_BLOCK = 256  # items of a tensor that are converted to a list at a time
_LONGEST_LIST = 64  # longest list that is searched for generators


class Order:
    """The items of one epoch.

    Attributes:
        checksum: Checksum of the items. If the sampler has no length, and perhaps no end: of the first 64.
        state: The sampler's `state_dict` before the epoch began, if it has one.
        length: Number of items. None: the sampler has no length.
    """

    def __init__(self, sampler: Iterable[Any], seed: int, epoch: int, max_items: int | None = None) -> None:
        self.state: Any = None
        if is_stateful(sampler):
            self.state = sampler.state_dict()  # type: ignore[attr-defined]
        _seed_parts(sampler, seed, epoch)
        self._rng = OwnRng(derived_seed(seed, epoch))
        self._iterator: Iterator[Any] | None = None
        self._items: Any = []
        """A range, a list or a tensor."""
        self._num_items = 0
        self._block_start, self._block = 0, list[Any]()
        """A part of the tensor, as a list."""
        self.length = length_of(sampler)
        if self.length is None:
            with self._rng.lent():
                self._iterator = iter(sampler)
                if max_items is not None:
                    self._items, self._iterator = list(itertools.islice(self._iterator, max_items)), None
                    self.length = self._num_items = len(self._items)
            self.count(0, _NUM_COMPARED)
            self.checksum = checksum(self._items[:_NUM_COMPARED])
            return
        with lent_rng(derived_seed(seed, epoch)):
            self._items = _all_items(sampler, seed, epoch)[:max_items]
        self.length = self._num_items = len(self._items)
        self.checksum = checksum(self._items)

    def count(self, start: int, limit: int) -> int:
        """How many items there are from `start` on, at most `limit`."""
        num_left = self._num_items - start
        if num_left >= limit:
            return limit
        if self._iterator is not None:
            with self._rng.lent():
                self._items += itertools.islice(self._iterator, limit - num_left)
            self._num_items = len(self._items)
            num_left = self._num_items - start
        return max(0, min(limit, num_left))

    def items(self, start: int, stop: int) -> Sequence[Any]:
        """The items from `start` to `stop`. `count` must have found that they exist."""
        if not isinstance(self._items, torch.Tensor):
            part: Sequence[Any] = self._items[start:stop]
            return part
        first = start - self._block_start
        if first < 0 or stop > self._block_start + len(self._block):
            # Slicing the tensor for each batch would take longer than all other work for the batch.
            self._block_start, first = start, 0
            self._block = self._items[start : max(stop, start + _BLOCK)].tolist()
        return self._block[first : first + stop - start]

    def all_items(self) -> Sequence[Any]:
        """All items. A sampler without a length must end."""
        while self.count(self._num_items, 1024):
            pass
        return self.items(0, self._num_items)


class EpochOrdered(Dataset[Any]):
    """A map-style data set that determines the order of each epoch itself."""

    def __len__(self) -> int:
        """Number of samples in each epoch."""
        raise NotImplementedError

    def epoch_indices(self, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
        """The order of an epoch. The trainer calls this instead of using a sampler.

        Args:
            seed: Seed of the run.
            epoch: The epoch, from 0.
            shuffle: Whether the loader was made with `shuffle=True`.

        Returns:
            The indices for `__getitem__`, in order: int64, `len(self)` of them.
        """
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """The name of a sample in the log.

        Args:
            index: An index, as `__getitem__` gets it.
        """
        return str(index)


class DatasetOrder(Sampler[int]):
    """Replaces torch's sampler if the data set orders its epochs itself."""

    def __init__(self, dataset: EpochOrdered, shuffle: bool) -> None:
        self.dataset, self.shuffle = dataset, shuffle

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        raise NotImplementedError  # `Order` asks the data set


def sampler_name(sampler: Any) -> str:
    """The name of a sampler in the records of a run."""
    if isinstance(sampler, DatasetOrder):
        return type(sampler.dataset).__name__ + (" (shuffled)" if sampler.shuffle else "")
    return type(sampler).__name__


def permutation(num_items: int, *seed: Any) -> torch.Tensor:
    """A permutation that depends only on `seed`: int64."""
    return torch.randperm(num_items, generator=torch.Generator().manual_seed(derived_seed(*seed)))


def is_stateful(data: Any) -> bool:
    """Whether `data` can save and restore its own position."""
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def length_of(data: Any) -> int | None:
    """The length of data or of a sampler. None: it has none."""
    try:
        return len(data)
    except TypeError:
        return None


def count_batches(num_epochs: int, length: int | None, num_seen: int, size: int, drop_last: bool) -> int | None:
    """Number of batches of `size` items in `num_epochs` epochs, if `num_seen` items of the first one are gone. A batch
    may begin in one epoch and end in the next, and the last batch counts in full, unless `drop_last`. None: the length
    is unknown.
    """
    if length is None:
        return None
    if drop_last:
        return max(0, num_epochs * (length // size) - num_seen // size)
    return max(0, -((num_seen - num_epochs * length) // size))


def _all_items(sampler: Iterable[Any], seed: int, epoch: int) -> Any:
    if isinstance(sampler, range):
        return sampler
    if isinstance(sampler, DatasetOrder):
        return sampler.dataset.epoch_indices(seed, epoch, sampler.shuffle)
    if type(sampler) is SequentialSampler:
        return range(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement:
        return _permutations(sampler)
    return list(sampler)


def _permutations(sampler: RandomSampler) -> torch.Tensor:
    """The same as `list(sampler)`, as a tensor: 8 bytes an item instead of 40."""
    num, num_samples = len(sampler.data_source), sampler.num_samples
    generator = sampler.generator
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    whole = [torch.randperm(num, generator=generator) for _ in range(num_samples // num)]
    tail = num_samples % num
    parts = [*whole, torch.randperm(num, generator=generator)[:tail]] if tail else whole
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _seed_parts(sampler: Any, seed: int, epoch: int) -> None:
    """Pass the epoch to a sampler and the samplers inside it, and seed their generators."""
    num_seeded = 0
    for part in _parts(sampler, set()):
        if not _is_generator(part):
            part.set_epoch(epoch)
            continue
        own = derived_seed(seed, epoch) if num_seeded == 0 else derived_seed(seed, epoch, num_seeded)
        num_seeded += 1
        if isinstance(part, torch.Generator):
            part.manual_seed(own)
        elif isinstance(part, random.Random) or hasattr(part, "set_state"):  # numpy's RandomState
            part.seed(own)
        else:
            part.bit_generator.state = type(part.bit_generator)(own).state


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """All generators in a sampler, and all samplers with `set_epoch` in it, including itself. Each appears once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if _is_generator(value):
        yield value
    elif isinstance(value, list | tuple) and len(value) <= _LONGEST_LIST:
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, Sampler) or len(seen) == 1:
        if callable(getattr(value, "set_epoch", None)):
            yield value
        for item in getattr(value, "__dict__", {}).values():
            yield from _parts(item, seen)


def _is_generator(value: Any) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)
