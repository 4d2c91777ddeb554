"""A `DataLoader` over an `IterableDataset`, sharded here: every rank reads the same samples and takes its own slices.

```
worker 0:  head │ group │ group │ … │ tail       group: world size x batch size consecutive samples of a worker;
worker 1:         group │ group │ … │ tail              rank r gets the r-th slice of it, collated in the worker
                                      └──────►   the tails of all workers, and the head of the next epoch, make the
                                                 groups at an epoch's end, which are collated in this process
```

Without workers this process reads in the same way. The position is the number of samples that were consumed of each
worker, so a run can go on at any number of processes. All ranks read alike because the data set draws from random
generators of its own, which depend on seed, epoch and worker only.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from ..errors import DataReplayWarning
from ..rng import OwnRng, derived_seed, seed_all
from .checksums import sample_checksum
from .order import count_batches, is_stateful, length_of
from .workers import WithOwnDataset, end_workers, start_iterator

EMPTY = "`build_data_loader` returned data without a batch."
EXHAUSTED = (
    "The data ended before `max_steps`, and can't be iterated again: it gave nothing the second time. Return an object"
    " whose `__iter__` starts anew, for example a DataLoader or a list, or lower `max_steps`."
)


class SampledSource:
    """Batches from a `DataLoader` over an `IterableDataset`, with or without workers."""

    has_length = False

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int, world_size: int) -> None:
        self._given, self._seed, self._rank = loader, seed, rank
        self._num_workers = loader.num_workers
        self._is_stateful = is_stateful(loader.dataset) and not loader.num_workers
        size = loader.batch_size or 1
        self._group_size = size * world_size
        self._length = length_of(loader.dataset)
        self._collate = _Collate(
            loader.collate_fn, slice(rank * size, (rank + 1) * size), is_single=loader.batch_size is None
        )
        self._compares = world_size > 1
        self.epoch = 0
        self.checksum = 0
        self._seen = [0] * max(1, self._num_workers)
        """Samples of the epoch that were consumed, by worker."""
        self._next_worker = 0
        self._is_placed = False
        """Whether `load_state_dict` has brought the data set to the position."""
        self._rng: dict[str, Any] | None = None
        self._reader: _Reader | None = None
        self._items: Iterator[_Item] = iter(())
        self._batches: Iterator[Any] | None = None

    @property
    def num_epochs_done(self) -> int:
        min_left = self._group_size if self._given.drop_last else 1
        return self.epoch + (self._length is not None and sum(self._seen) + min_left > self._length)

    def num_batches_left(self, num_epochs: int) -> int | None:
        position = num_epochs - self.epoch, self._length, sum(self._seen)
        return count_batches(*position, self._group_size, self._given.drop_last)

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, sum(self._seen)

    def open(self) -> Iterator[Any]:
        if self._batches is None:
            self._begin_epoch(head=(0, 0))
            self._batches = self._endless()
        return self._batches

    def compared_checksum(self) -> int | None:
        return None  # what was read first is part of `checksum`

    def close(self) -> None:
        if self._num_workers:  # else nothing runs in the background, and a stream can't be read again where it stood
            end_workers(self._items)
            self._items, self._batches = iter(()), None

    def state_dict(self) -> dict[str, Any]:
        dataset: Any = self._given.dataset
        return {
            "kind": type(self).__name__,
            "seed": self._seed,
            "epoch": self.epoch,
            "position": sum(self._seen),
            "seen": list(self._seen),
            "next_worker": self._next_worker,
            "dataset": dataset.state_dict() if self._is_stateful else None,
        }

    def rank_state_dict(self) -> dict[str, Any]:
        return {"rng": self._reader.rng.state() if self._reader is not None and self._is_stateful else None}

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        dataset: Any = self._given.dataset
        self._seed, self.epoch = state.get("seed", self._seed), state["epoch"]
        self._rng = None if rank_state is None else rank_state.get("rng", rank_state.get("epoch_rng"))
        num_seen, num_workers = state["position"], len(self._seen)
        seen = state.get("seen", [num_seen])
        self._next_worker = state.get("next_worker", 0)
        if len(seen) != num_workers:
            if num_seen:
                warnings.warn(
                    f"The data position was saved with {len(seen)} workers, but there are {num_workers} now, and the"
                    f" order of the samples depends on that. The run skips {num_seen} samples, as many as it has seen"
                    f" of this epoch: up to {num_seen} are seen twice in it, and as many never. Keep `num_workers` for"
                    " an exact resume.",
                    DataReplayWarning,
                    stacklevel=2,
                )
            seen = [num_seen // num_workers + (worker < num_seen % num_workers) for worker in range(num_workers)]
            self._next_worker = 0
        self._seen, self._batches = list(seen), None
        self._is_placed = self._is_stateful and state["dataset"] is not None
        if self._is_placed:
            dataset.load_state_dict(state["dataset"])

    def _begin_epoch(self, head: tuple[int, int]) -> None:
        """Begin to read the epoch, at the position.

        Args:
            head: How many samples the end of the last epoch still needs for a group, and the worker that gives them.
        """
        dataset: Any = self._given.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self.epoch)
        seen = [0] * len(self._seen) if self._is_placed else list(self._seen)
        if sum(seen):
            in_workers = " in workers" if self._num_workers else ""
            warnings.warn(
                f"The data has no `state_dict` that can be used{in_workers}, so the {sum(seen)} samples that this run"
                " has already seen of the epoch are drawn again. Give the data set `state_dict` and `load_state_dict`"
                f"{' and use no workers' if in_workers else ''} to go there at once.",
                DataReplayWarning,
                stacklevel=2,
            )
        self._reader = _Reader(dataset, derived_seed(self._seed, "stream", self.epoch), self._rng)
        stream = _Stream(
            reader=self._reader,
            collate=self._collate,
            group_size=self._group_size,
            seen=seen,
            next_worker=self._next_worker,
            head=head,
            compares=self._compares,
            is_shown=self._rank == 0,
        )
        self._is_placed, self._rng = False, None
        seed = derived_seed(self._seed, "workers", self.epoch, self._rank)
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            pin_memory=self._given.pin_memory,
            timeout=self._given.timeout,
            worker_init_fn=WithOwnDataset(self._given.worker_init_fn),
            multiprocessing_context=self._given.multiprocessing_context,
            generator=torch.Generator().manual_seed(seed),
            prefetch_factor=self._given.prefetch_factor,
        )
        self._items = start_iterator(loader)

    def _endless(self) -> Iterator[Any]:
        carried: list[Any] = []  # samples at an epoch's end that do not fill a group
        while True:
            has_batch = False
            tails: dict[int, list[Any]] = {}
            for item in self._items:
                self.checksum = (31 * self.checksum + item.checksum) % 2**31
                self._next_worker = (item.worker + 1) % len(self._seen)
                is_short = item.kind == "head" and len(carried) + len(item.payload) < self._group_size
                if item.kind == "tail" or is_short:
                    tails.setdefault(item.worker, []).extend(item.payload)
                    continue
                if item.kind == "group" and carried:
                    raise ValueError(
                        f"No worker gives the {self._group_size - len(carried)} samples that a global batch at the end"
                        f" of epoch {self.epoch - 1} needs. Use fewer workers, a smaller batch, or `drop_last=True`."
                    )
                if item.kind == "group":
                    num_samples, batch = self._group_size, item.payload
                else:
                    num_samples, batch = len(item.payload), self._collate([*carried, *item.payload])
                    carried = []
                if num_samples:
                    self._seen[item.worker] += num_samples
                    has_batch = True
                    yield batch
            rest = [(worker, sample) for worker in sorted(tails) for sample in tails[worker]]
            if not sum(self._seen) and not rest:
                raise ValueError(EMPTY if self.epoch == 0 else EXHAUSTED)
            shares = [num_seen + [worker for worker, _ in rest].count(i) for i, num_seen in enumerate(self._seen)]
            while (num_missing := self._group_size - len(carried)) <= len(rest):
                group, rest = rest[:num_missing], rest[num_missing:]
                for worker, _ in group:
                    self._seen[worker] += 1
                batch, carried = self._collate([*carried, *(sample for _, sample in group)]), []
                has_batch = True
                yield batch
            if self._given.drop_last:
                if not has_batch:
                    raise ValueError(
                        f"The data gives {sum(shares)} samples an epoch, but `drop_last=True` drops what doesn't fill a"
                        f" global batch of {self._group_size}. Make the batch smaller or keep the rest."
                    )
            else:
                carried += [sample for _, sample in rest]
            self.epoch, self._seen, self._next_worker = self.epoch + 1, [0] * len(shares), 0
            self._begin_epoch(head=(-len(carried) % self._group_size, shares.index(max(shares))))


@dataclass
class _Collate:
    """Makes this rank's batch of a group. Workers unpickle it."""

    function: Callable[[Any], Any]
    own: slice
    is_single: bool

    def __call__(self, group: list[Any]) -> Any:
        own = group[self.own]
        return self.function(own[0] if self.is_single else own)


class _Item(NamedTuple):
    """What a worker gives at a time."""

    worker: int
    kind: str
    """"group": the payload is this rank's batch. "head", "tail": samples, of all ranks."""
    payload: Any
    checksum: int
    """Of the first samples that the worker has read; else 0."""


class _Stream(IterableDataset[_Item]):
    """What a worker reads in one epoch; without workers, this process.

    Args:
        reader: Reads the data set.
        collate: Makes of a group this rank's batch.
        group_size: Samples a group.
        seen: By worker, how many samples to skip.
        next_worker: Whose turn it is. Those before it give an empty head first, so that the order of turns stays.
        head: How many samples to give first, and by which worker.
        compares: Whether the ranks compare what they read first.
        is_shown: Whether to show a bar while skipping.
    """

    def __init__(
        self,
        *,
        reader: _Reader,
        collate: Callable[[list[Any]], Any],
        group_size: int,
        seen: list[int],
        next_worker: int,
        head: tuple[int, int],
        compares: bool,
        is_shown: bool,
    ) -> None:
        self.reader, self._collate, self._group_size = reader, collate, group_size
        self._seen, self._next_worker, self._head = seen, next_worker, head
        self._compares, self._is_shown = compares, is_shown

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        reader, index = self.reader, self._seen[worker]
        reader.begin(worker)
        reader.skip(index, is_shown=self._is_shown and worker == 0)
        to_compare = self._compares
        if worker < self._next_worker:
            yield _Item(worker, "head", [], 0)
        if self._head[0] and worker == self._head[1]:
            samples = reader.take(self._head[0])
            yield _Item(worker, "head", samples, sample_checksum(samples) if to_compare else 0)
            index, to_compare = index + len(samples), False
        while True:
            samples = reader.take(self._group_size)
            checksum = sample_checksum(samples) if to_compare else 0
            to_compare = False
            if len(samples) < self._group_size:
                yield _Item(worker, "tail", samples, checksum)
                return
            if info is not None:  # so that a random collate function repeats itself after a resume
                seed_all(derived_seed(info.seed - info.id, worker, index))
            index += len(samples)
            yield _Item(worker, "group", self._collate(samples), checksum)

    @property
    def dataset(self) -> Any:
        """The user's."""
        return self.reader.dataset


class _Reader:
    """Reads a data set with random generators of its own, so that every rank reads the same.

    Args:
        dataset: The user's.
        seed: Of the generators; each worker has others.
        state: Of the generators, where they were saved.
    """

    def __init__(self, dataset: Any, seed: int, state: dict[str, Any] | None) -> None:
        self.dataset, self._seed, self._state = dataset, seed, state
        self.rng = OwnRng(seed)

    def begin(self, worker: int) -> None:
        """Start the iterator of this worker."""
        self.rng = OwnRng(derived_seed(self._seed, worker), self._state)
        with self.rng.lent():
            self._samples = iter(self.dataset)

    def take(self, count: int) -> list[Any]:
        """The next samples; fewer at the end."""
        with self.rng.lent():
            return list(itertools.islice(self._samples, count))

    def skip(self, count: int, is_shown: bool) -> None:
        """Read samples that were seen already, and drop them."""
        if not count:
            return
        with tqdm(total=count, desc="drawing again", unit="samples", disable=not is_shown) as bar:
            while count and (samples := self.take(min(count, 256))):
                count -= len(samples)
                bar.update(len(samples))


def _as_it_is(item: Any) -> Any:
    return item
