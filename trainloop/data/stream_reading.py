"""How a stream is read: in groups, from a position on, with random generators that are the same on every rank.

It runs in the loader's workers, and without workers in the process of the rank.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from tqdm.auto import tqdm

from ..rng import OwnRng, derived_seed, seed_all
from .checksums import sample_checksum
from .order import is_stateful
from .shares import can_be_loaded, is_of_hugging_face


@dataclass
class Collate:
    """Makes this rank's batch of a group. Workers unpickle it."""

    function: Callable[[Any], Any]
    own: slice
    is_single: bool

    def __call__(self, group: list[Any]) -> Any:
        own = group[self.own]
        return self.function(own[0] if self.is_single else own)


class Item(NamedTuple):
    """What a worker gives at a time."""

    worker: int
    kind: str
    """"group": the payload is this rank's batch. "head", "tail": samples, of all ranks."""
    payload: Any
    checksum: int
    """Of the first samples that the worker has read; else 0."""
    state: bytes | None = None
    """Where the worker stands after these samples, if the data set can tell."""


class Place(NamedTuple):
    """Where a worker begins to read."""

    num_seen: int = 0
    """Samples of the epoch that were consumed."""
    num_at_state: int = 0
    """Of these, how many were consumed when the state was taken; the others are read again."""
    state: bytes | None = None
    """Of the data set and the random generators."""

    @property
    def num_skipped(self) -> int:
        """Samples to read and drop."""
        return self.num_seen - self.num_at_state


class Consumed(NamedTuple):
    """What was consumed, or what was fetched, which may be a batch more."""

    epoch: int = 0
    places: tuple[Place, ...] = (Place(),)
    """Of the epoch, by worker."""
    next_worker: int = 0
    checksum: int = 0

    @property
    def num_seen(self) -> int:
        """Samples of the epoch."""
        return sum(place.num_seen for place in self.places)


class StreamReading(IterableDataset[Item]):
    """What a worker reads in one epoch; without workers, this process.

    Args:
        reader: Reads the data set.
        collate: Makes of a group this rank's batch.
        group_size: Samples a group.
        places: By worker, where it begins.
        next_worker: Whose turn it is. Those before it give an empty head first, so that the order of turns stays.
        head: How many samples to give first, and by which worker.
        compares: Whether the ranks compare what they read first.
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
                # So that a random collate function repeats itself after a resume.
                seed_all(derived_seed(info.seed - info.id, worker, index))
            index += len(samples)
            yield Item(worker, "group", self._collate(samples), checksum, state)

    @property
    def dataset(self) -> Any:
        """The user's."""
        return self.reader.dataset


class Reader:
    """Reads a data set under its own random generators, so that every rank reads the same.

    Args:
        dataset: The user's.
        seed: Of the generators; each worker has others.
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
        """Start the iterator of this worker, at a state of it."""
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
        """Where the data set, or else its iterator, stands, and the random generators; None: neither can tell.

        It is pickled here, so that tensors in it go from a worker to its rank by value, and not in shared memory.
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
        """Read samples that were seen already, and drop them."""
        if not count:
            return
        with tqdm(total=count, desc="drawing again", unit="samples", disable=not is_shown) as bar:
            while count and (samples := self.take(min(count, 256))):
                count -= len(samples)
                bar.update(len(samples))


def as_it_is(item: Any) -> Any:
    """A collate function that does nothing."""
    return item
