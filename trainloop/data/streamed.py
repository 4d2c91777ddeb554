"""A `DataLoader` over an `IterableDataset`, sharded here: every rank reads the same samples and takes its own slices.

```
worker 0:  head │ group │ group │ … │ tail       group: world size x batch size consecutive samples of a worker;
worker 1:         group │ group │ … │ tail              rank r gets the r-th slice of it, collated in the worker
                                      └──────►   the tails of all workers and the head of the next epoch form the
                                                 groups at an epoch's end, which are collated in this process
```

Without workers, this process reads in the same way. The position is the number of consumed samples of each worker, so a
run can resume at any number of processes. All ranks read the same, because the data set draws from separate random
generators, which depend only on seed, epoch and worker.

If a data set gives each rank its share, each rank reads alone in the same way: a group is a batch, and each rank has
its own position.
"""

from __future__ import annotations

import pickle
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import DataReplayWarning
from ..ranks import collectives
from ..rng import derived_seed
from .order import count_batches, is_stateful, length_of
from .read_cost import ReadCost
from .shares import lost_by_state, share_of, shuffle_checksum
from .stream_reading import Collate, Consumed, Item, Place, Reader, StreamReading, as_it_is
from .workers import WithOwnDataset, end_workers, has_ready_batch, start_iterator

EMPTY = "`build_data_loader` returned data without a batch."
EXHAUSTED = (
    "The data ended before `max_steps`, and can't be iterated again: it gave nothing the second time. Return an object"
    " whose `__iter__` starts anew, for example a DataLoader or a list, or lower `max_steps`."
)


def most_of_ranks(num_batches: int | None) -> int | None:
    """The largest number of batches that any rank has left. None: a rank's data has no length. Call on every rank."""
    by_rank: list[int | None] = collectives.gather_objects(num_batches)
    known = [num_left for num_left in by_rank if num_left is not None]
    return max(known) if len(known) == len(by_rank) else None


class SampledSource:
    """Batches from a `DataLoader` over an `IterableDataset`, with or without workers."""

    has_length = False

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int, world_size: int) -> None:
        share = share_of(loader.dataset, rank, world_size)
        self._given, self._dataset, self._is_own = loader, share.dataset, share.is_own
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._num_workers = loader.num_workers
        size = loader.batch_size or 1
        place, num_readers = (0, 1) if self._is_own else (rank, world_size)
        self._group_size = size * num_readers
        self._length = length_of(share.dataset)
        self._collate = Collate(
            loader.collate_fn, slice(place * size, (place + 1) * size), is_single=loader.batch_size is None
        )
        self._shuffle_checksum = shuffle_checksum(share.dataset)
        self._unit = "batches" if loader.batch_size is None else "samples"
        self._compares = num_readers > 1
        self._cost = ReadCost(world_size, share.obstacle) if self._compares and rank == 0 else None
        self._consumed = Consumed(places=(Place(),) * max(1, self._num_workers))
        self._ahead: deque[Consumed] = deque()
        """The position after each batch that was fetched but not consumed."""
        self._read_on(self._consumed)
        self._reader: Reader | None = None
        """Reads in this process. None: workers read."""
        self._is_at_tail = False
        """Whether more was read than consumed, because the epoch ends."""
        self._items: Iterator[Item] = iter(())
        self._batches: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        return self._consumed.epoch

    @property
    def checksum(self) -> int:
        return self._consumed.checksum

    @property
    def num_epochs_done(self) -> int:
        min_left = self._group_size if self._given.drop_last else 1
        return self.epoch + (self._length is not None and self._consumed.num_seen + min_left > self._length)

    def num_batches_left(self, num_epochs: int) -> int | None:
        position = num_epochs - self.epoch, self._length, self._consumed.num_seen
        own = count_batches(*position, self._group_size, self._given.drop_last)
        return most_of_ranks(own) if self._is_own else own

    @property
    def position(self) -> tuple[int, int]:
        return (0, 0) if self._is_own else self.own_position

    @property
    def own_position(self) -> tuple[int, int]:
        """This rank's epoch, and its consumed samples."""
        return self.epoch, self._consumed.num_seen

    def open(self) -> Iterator[Any]:
        if self._batches is None:
            self._begin_epoch(head=(0, 0))
            self._consumed = self._fetched()
            batches = self._endless()
            self._batches = batches if self._cost is None else self._cost.measured(batches, lambda: self._epoch)
        return self._batches

    def advance(self) -> None:
        self._consumed = self._ahead.popleft()

    def has_ready_batch(self) -> bool:
        return has_ready_batch(self._items)

    def compared_checksum(self) -> int | None:
        return self._shuffle_checksum if self._is_own else None  # otherwise `checksum` includes the first samples

    def close(self) -> None:
        if self._num_workers:  # without them there is no background work, and a stream can't be reopened in the middle
            end_workers(self._items)
            self._items, self._batches = iter(()), None
            self._read_on(self._consumed)

    # ------------------------------------------------------------------ the position

    def state_dict(self) -> dict[str, Any]:
        own = {"epoch": self.epoch, "position": self._consumed.num_seen}
        place = own if self._is_own else self._position()
        return {
            "kind": type(self).__name__,
            "seed": self._seed,
            "world_size": self._world_size,
            "is_own": self._is_own,
            **place,
        }

    def rank_state_dict(self) -> dict[str, Any] | None:
        return self._position() if self._is_own else None

    def _position(self) -> dict[str, Any]:
        reader = self._reader
        if reader is not None and reader.has_begun and not self._is_at_tail and (state := reader.state()) is not None:
            num_seen = self._consumed.num_seen
            self._places = [Place(num_seen, num_seen, state)]
            self._consumed = self._fetched()
        consumed = self._consumed
        return {
            "epoch": consumed.epoch,
            "position": consumed.num_seen,
            "seen": [place.num_seen for place in consumed.places],
            "next_worker": consumed.next_worker,
            "shuffle": self._shuffle_checksum,
            "states": [
                None if place.state is None else {"num_seen": place.num_at_state, **pickle.loads(place.state)}
                for place in consumed.places
            ],
        }

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        was_own = state.get("is_own", False)
        self._seed, self._batches, self._reader = state.get("seed", self._seed), None, None
        position = state
        if was_own and self._is_own and rank_state is not None:
            position = rank_state
        elif was_own or self._is_own:
            position = self._told_as_many(state, was_own)
        epoch, next_worker = position["epoch"], position.get("next_worker", 0)
        num_seen, num_workers = position["position"], len(self._places)
        seen, states = position.get("seen", [num_seen]), position.get("states", [])
        if state.get("dataset") is not None:  # of trainloop 0.1.0
            rng = {} if rank_state is None else {"rng": rank_state.get("rng", rank_state.get("epoch_rng"))}
            states = [{"num_seen": num_seen, "dataset": state["dataset"], **rng}]
        if len(seen) != num_workers:
            if num_seen and not position.get("is_inexact"):
                warnings.warn(
                    f"The data position was saved with {len(seen)} workers, and this run has {num_workers}. The order"
                    f" of the samples depends on that number. The run skips {num_seen} samples, as many as it has seen"
                    f" of this epoch. In this epoch, up to {num_seen} samples are seen twice and as many are never"
                    " seen. For an exact resume, keep `num_workers`.",
                    DataReplayWarning,
                    stacklevel=2,
                )
            seen = [num_seen // num_workers + (worker < num_seen % num_workers) for worker in range(num_workers)]
            next_worker, states = 0, []
        places = [Place(num) for num in seen]
        if num_seen and position.get("shuffle", self._shuffle_checksum) != self._shuffle_checksum:
            raise ValueError(
                f"The data set is shuffled in another way than in the saved run, so samples of epoch {epoch} would"
                " be seen twice and others never. Give it the same seed in every run: `dataset.shuffle(seed=…)`."
            )
        for worker, saved in enumerate(states):
            if saved is not None:
                saved = dict(saved)
                places[worker] = Place(seen[worker], saved.pop("num_seen"), pickle.dumps(saved))
        self._consumed = Consumed(epoch, tuple(places), next_worker, self.checksum)
        self._read_on(self._consumed)
        if num_seen and any(place.state for place in places) and (lost := lost_by_state(self._dataset)):
            warnings.warn(lost, DataReplayWarning, stacklevel=2)

    def _told_as_many(self, state: dict[str, Any], was_own: bool) -> dict[str, Any]:
        """A place in the new shares that is equally far in the epoch."""
        num_saved = state["world_size"] if was_own else 1
        num_seen = state["position"] * num_saved
        own = num_seen // self._world_size if self._is_own else num_seen
        if num_seen:
            warnings.warn(
                f"Each process reads a share of the data. The position was saved by {state.get('world_size', 1)}"
                f" processes, and this run has {self._world_size}, so the shares are different. Each process skips"
                f" {own} {self._unit}, which leaves as much of the epoch as before. In this epoch, up to"
                f" {num_seen} {self._unit} are seen twice and as many are never seen. For an exact resume, keep the"
                " number of processes.",
                DataReplayWarning,
                stacklevel=3,
            )
        return {"epoch": state["epoch"], "position": own, "seen": [], "is_inexact": True}

    # ------------------------------------------------------------------ reading

    def _read_on(self, consumed: Consumed) -> None:
        """Continue reading after the consumed samples."""
        self._ahead.clear()
        self._epoch, self._places = consumed.epoch, list(consumed.places)
        self._next_worker, self._checksum = consumed.next_worker, consumed.checksum

    def _fetched(self) -> Consumed:
        return Consumed(self._epoch, tuple(self._places), self._next_worker, self._checksum)

    def _begin_epoch(self, head: tuple[int, int]) -> None:
        """Begin to read the epoch, at the position.

        Args:
            head: Number of samples that the end of the last epoch still needs for a group, and the worker that yields
                them.
        """
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(self._epoch)
        if num_again := sum(place.num_skipped for place in self._places if place.state is None):
            warnings.warn(
                f"The data has no `state_dict` that can be used. To return to its position in the epoch, the run reads"
                f" {num_again} {self._unit} again. Give the data set `state_dict` and `load_state_dict` to avoid this.",
                DataReplayWarning,
                stacklevel=2,
            )
        reader = Reader(self._dataset, derived_seed(self._seed, "stream", self._epoch))
        stream = StreamReading(
            reader=reader,
            collate=self._collate,
            group_size=self._group_size,
            places=list(self._places),
            next_worker=self._next_worker,
            head=head,
            compares=self._compares,
            is_shown=self._rank == 0,
        )
        if not self._num_workers and self._places[0].state is None and is_stateful(self._dataset):
            self._places[0] = self._places[0]._replace(state=reader.state())  # an epoch's tail is counted from here
        seed = derived_seed(self._seed, "workers", self._epoch, self._rank)
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self._num_workers,
            pin_memory=self._given.pin_memory,
            timeout=self._given.timeout,
            worker_init_fn=WithOwnDataset(self._given.worker_init_fn),
            multiprocessing_context=self._given.multiprocessing_context,
            generator=torch.Generator().manual_seed(seed),
            prefetch_factor=self._given.prefetch_factor,
        )
        self._reader, self._is_at_tail = None if self._num_workers else reader, False
        self._items = start_iterator(loader)

    def _advance(self, worker: int, count: int, state: bytes | None = None) -> None:
        """Count samples of a worker as part of a batch. `state` is the state after them."""
        place = self._places[worker]
        num_seen = place.num_seen + count
        self._places[worker] = place._replace(num_seen=num_seen) if state is None else Place(num_seen, num_seen, state)

    def _endless(self) -> Iterator[Any]:
        carried: list[Any] = []  # samples at an epoch's end that don't fill a group
        while True:
            has_batch = False
            tails: dict[int, list[Any]] = {}
            for item in self._items:
                self._checksum = (31 * self._checksum + item.checksum) % 2**31
                self._next_worker = (item.worker + 1) % len(self._places)
                is_short = item.kind == "head" and len(carried) + len(item.payload) < self._group_size
                self._is_at_tail = item.kind == "tail" or is_short
                if self._is_at_tail:
                    tails.setdefault(item.worker, []).extend(item.payload)
                    continue
                if item.kind == "group" and carried:
                    raise ValueError(
                        f"No worker gives the {self._group_size - len(carried)} samples that a global batch at the end"
                        f" of epoch {self._epoch - 1} needs. Use fewer workers, a smaller batch, or `drop_last=True`."
                    )
                if item.kind == "group":
                    num_samples, batch = self._group_size, item.payload
                else:
                    num_samples, batch = len(item.payload), self._collate([*carried, *item.payload])
                    carried = []
                if num_samples:
                    self._advance(item.worker, num_samples, item.state)
                    has_batch = True
                    self._ahead.append(self._fetched())
                    yield batch
            rest = [(worker, sample) for worker in sorted(tails) for sample in tails[worker]]
            if not self._fetched().num_seen and not rest:
                raise ValueError(EMPTY if self._epoch == 0 else EXHAUSTED)
            from_rest = [[worker for worker, _ in rest].count(i) for i in range(len(self._places))]
            shares = [place.num_seen + count for place, count in zip(self._places, from_rest, strict=True)]
            while (num_missing := self._group_size - len(carried)) <= len(rest):
                group, rest = rest[:num_missing], rest[num_missing:]
                for worker, _ in group:
                    self._advance(worker, 1)
                batch, carried = self._collate([*carried, *(sample for _, sample in group)]), []
                has_batch = True
                self._ahead.append(self._fetched())
                yield batch
            if self._given.drop_last:
                if not has_batch:
                    raise ValueError(
                        f"The data gives {sum(shares)} samples an epoch, but `drop_last=True` drops what doesn't fill a"
                        f" global batch of {self._group_size}. Make the batch smaller or keep the rest."
                    )
            else:
                carried += [sample for _, sample in rest]
            self._epoch, self._places, self._next_worker = self._epoch + 1, [Place()] * len(shares), 0
            self._begin_epoch(head=(-len(carried) % self._group_size, shares.index(max(shares))))
