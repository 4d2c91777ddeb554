"""Reads a stream in groups, from a position on, with random generators that are the same on every rank.

This runs in the loader's workers. Without workers it runs in the process of the rank.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from ..rng import OwnRng, derived_seed, seed_all
from ..terminal import Bar
from .checksums import sample_checksum
from .order import is_stateful
from .shares import can_be_loaded, is_of_hugging_face


@dataclass
class Collate:
    """Makes this rank's batch from a group. Workers unpickle it."""

    function: Callable[[Any], Any]
    own: slice
    is_single: bool

    def __call__(self, group: list[Any]) -> Any:
        own = group[self.own]
        return self.function(own[0] if self.is_single else own)


class Item(NamedTuple):
    """One message of a worker."""

    worker: int
    kind: str
    """"group": the payload is this rank's batch. "head" and "tail": samples of all ranks."""
    payload: Any
    checksum: int
    """Checksum of the first samples that the worker has read; else 0."""
    state: bytes | None = None
    """Position of the worker after these samples, if the data set can provide it."""


class Place(NamedTuple):
    """The place where a worker begins to read."""

    num_seen: int = 0
    """Number of consumed samples of the epoch."""
    num_at_state: int = 0
    """How many of them were consumed when the state was taken. The others are read again."""
    state: bytes | None = None
    """State of the data set and of the random generators."""

    @property
    def num_skipped(self) -> int:
        """Number of samples to read and drop."""
        return self.num_seen - self.num_at_state


class Consumed(NamedTuple):
    """A position: after the consumed batches, or after the fetched ones, which may be one more."""

    epoch: int = 0
    places: tuple[Place, ...] = (Place(),)
    """The place of each worker in the epoch."""
    next_worker: int = 0
    checksum: int = 0

    @property
    def num_seen(self) -> int:
        """Number of samples of the epoch before this position."""
        return sum(place.num_seen for place in self.places)


class StreamReading(IterableDataset[Item]):
    """The stream that a worker, or this process without workers, reads in one epoch.

    Args:
        reader: Reads the data set.
        collate: Makes this rank's batch from a group.
        group_size: Samples in a group.
        places: The place of each worker.
        next_worker: The worker whose turn it is. The workers before it first yield an empty head, to keep the order of
            turns.
        head: Number of samples to yield first, and the worker that yields them.
        compares: Whether the ranks compare the first samples.
        is_shown: Whether to show a bar while skipping.
    """

    def __init__(
        self,
        *,
        reader: Reader,
        collate: Callable[[list[Any]], Any],
        group_size: int,
        places: list[Place],
        next_worker: int,
        head: tuple[int, int],
        compares: bool,
        is_shown: bool,
    ) -> None:
        self.reader, self._collate, self._group_size = reader, collate, group_size
        self._places, self._next_worker, self._head = places, next_worker, head
        self._compares, self._is_shown = compares, is_shown

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        reader, place = self.reader, self._places[worker]
        index = place.num_seen
        reader.begin(worker, place.state)
        reader.skip(place.num_skipped, is_shown=self._is_shown and worker == 0)
        to_compare = self._compares
        if worker < self._next_worker:
            yield Item(worker, "head", [], 0)
        if self._head[0] and worker == self._head[1]:
            samples = reader.take(self._head[0])
            checksum = sample_checksum(samples) if to_compare else 0
            yield Item(worker, "head", samples, checksum, reader.state() if info is not None else None)
            index, to_compare = index + len(samples), False
        while True:
            samples = reader.take(self._group_size)
            checksum = sample_checksum(samples) if to_compare else 0
            to_compare = False
            if len(samples) < self._group_size:
                yield Item(worker, "tail", samples, checksum)
                return
            state = None
            if info is not None:
                state = reader.state()
                # So that a random collate function is reproducible after a resume.
                seed_all(derived_seed(info.seed - info.id, worker, index))
            index += len(samples)
            yield Item(worker, "group", self._collate(samples), checksum, state)

    @property
    def dataset(self) -> Any:
        """The user's data set."""
        return self.reader.dataset


class Reader:
    """Reads a data set under its own random generators, so that every rank reads the same samples.

    Args:
        dataset: The user's data set.
        seed: Seed of the generators. Each worker derives its own from it.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self._seed = dataset, seed
        self._rng = OwnRng(seed)
        self._samples: Iterator[Any] | None = None
        self._fresh_state: Any = None

    @property
    def has_begun(self) -> bool:
        return self._samples is not None

    def begin(self, worker: int, state: bytes | None) -> None:
        """Start the iterator of this worker, at a saved state."""
        saved = {} if state is None else pickle.loads(state)
        if get_worker_info() is not None and is_of_hugging_face(self.dataset):
            self._fresh_state = self.dataset.state_dict()
        self._rng = OwnRng(derived_seed(self._seed, worker), saved.get("rng"))
        with self._rng.lent():
            if "dataset" in saved:
                self.dataset.load_state_dict(saved["dataset"])
            samples = iter(self.dataset)
            if "iterator" in saved:
                samples.load_state_dict(saved["iterator"])
        self._samples = samples

    def state(self) -> bytes | None:
        """The state of the data set, or else of its iterator, and of the random generators. None: neither has a state.

        It is pickled here. So tensors in it go from a worker to its rank by value, not in shared memory.
        """
        if is_stateful(self.dataset):
            saved = {"dataset": self.dataset.state_dict()}
            if self._fresh_state is not None and not can_be_loaded(self._fresh_state, saved["dataset"]):
                return None
        elif is_stateful(self._samples):
            saved = {"iterator": self._samples.state_dict()}  # type: ignore[union-attr]
        else:
            return None
        if self.has_begun:
            saved["rng"] = self._rng.state()
        return pickle.dumps(saved)

    def take(self, count: int) -> list[Any]:
        """The next samples; fewer at the end."""
        assert self._samples is not None, "begin was called"
        with self._rng.lent():
            return list(itertools.islice(self._samples, count))

    def skip(self, count: int, is_shown: bool) -> None:
        """Read samples that were already seen, and drop them."""
        if not count:
            return
        with Bar("reading again", count, "sample", is_drawn=is_shown) as bar:
            while count and (samples := self.take(min(count, 256))):
                count -= len(samples)
                bar.update(len(samples))


def as_it_is(item: Any) -> Any:
    """A collate function that does nothing."""
    return item
