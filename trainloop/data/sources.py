"""The kinds of data, one source each, as one rank sees them.

- `IndexedSource`: a `DataLoader` over a map-style data set, or a sequence of batches. Sharded here; goes to any
  position at once, at any number of processes.
- `SampledSource`: a `DataLoader` over an `IterableDataset`. Sharded here; goes to a position by the data set's own
  `state_dict`, or by drawing again what the run has seen of the epoch.
- `IterableSource`: anything else that yields batches, a loader that Accelerate prepared included. Each rank yields its
  own; goes to a position in the same two ways.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from ..errors import DataReplayWarning
from ..rng import load_rng_state, rng_state
from .sampling import EndlessSampler, SeededDataset, batch_keys, sample_key, sampling_of

_CPU = torch.device("cpu")


class Source(Protocol):
    """One kind of data, as one rank sees it."""

    @property
    def epoch(self) -> int:
        """The epoch of the batch that was yielded last, from 0."""

    def open(self) -> Iterator[Any]:
        """Batches without end, from the current position on."""

    def close(self) -> None:
        """End what runs in the background; `open` may be called again."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as small values that are the same on all ranks."""

    def rank_state_dict(self) -> dict[str, Any] | None:
        """What belongs to this rank only."""

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        """Go to a position. Without `rank_state` it was saved at another number of processes."""


def with_workers(loader: DataLoader[Any], rank: int, world_size: int) -> DataLoader[Any]:
    """This rank's part of an `IterableDataset` that workers read, each with a copy of its own."""
    dataset: Any = loader.dataset
    if world_size > 1:
        dataset = IterableDatasetShard(
            dataset, loader.batch_size or 1, loader.drop_last, num_processes=world_size, process_index=rank
        )
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def with_sampler(loader: DataLoader[Any], sampler: Iterable[Any], seed: int) -> DataLoader[Any]:
    """A user's loader of a map-style data set with another sampler of what it samples, batches or items. It gets a
    generator of its own: making its iterator draws from the process's generator otherwise, which a resumed run would do
    once more. With workers the sampler yields keys of `SeededDataset`.
    """
    if loader.batch_sampler is None:
        sampling: dict[str, Any] = {"batch_size": None, "sampler": sampler}
    else:
        sampling = {"batch_sampler": sampler}
    return DataLoader(
        loader.dataset if loader.num_workers == 0 else SeededDataset(loader.dataset),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=loader.prefetch_factor,
        **sampling,
    )


class IndexedSource:
    """Batches from a map-style data set or a sequence, by index."""

    def __init__(self, data: DataLoader[Any] | Sequence[Any], seed: int, rank: int, world_size: int) -> None:
        self._data = data
        if isinstance(data, DataLoader):
            sampler, batch_size, drop_last = sampling_of(data)
        else:
            sampler, batch_size, drop_last = range(len(data)), None, False
        try:
            is_empty = len(sampler) == 0  # type: ignore[arg-type]
        except TypeError:
            is_empty = False
        if is_empty:
            raise ValueError("`build_data_loader` returned data without a sample.")
        key = None
        if isinstance(data, DataLoader) and data.num_workers > 0:
            key = batch_keys if sampler is data.batch_sampler else sample_key
        self._sampler = EndlessSampler(
            sampler, batch_size, drop_last, seed=seed, rank=rank, world_size=world_size, key=key
        )
        self._iterator: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        return self._sampler.epoch

    def open(self) -> Iterator[Any]:
        # Iterators made here, and not in the generator, so that `close` can end them.
        self._iterator = iter(self._loader()) if isinstance(self._data, DataLoader) else None
        return self._batches(self._iterator)

    def _batches(self, iterator: Iterator[Any] | None) -> Iterator[Any]:
        if iterator is None:
            for index in self._sampler:
                self._sampler.advance()
                yield self._data[index]  # type: ignore[index]
            return
        for batch in iterator:
            self._sampler.advance()
            yield batch

    def _loader(self) -> DataLoader[Any]:
        assert isinstance(self._data, DataLoader)
        return with_sampler(self._data, self._sampler, self._sampler.seed)

    def close(self) -> None:
        _end_workers(self._iterator)
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        sampler = self._sampler
        return {
            "kind": type(self).__name__,
            "seed": sampler.seed,
            "epoch": sampler.epoch,
            "position": sampler.position,
        }

    def rank_state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        self._sampler.seed = state["seed"]
        self._sampler.epoch, self._sampler.position = state["epoch"], state["position"]


class SampledSource:
    """Batches from a `DataLoader` without workers over an `IterableDataset`, whose samples all ranks read alike: each
    takes its own slice of every global batch. At any number of processes a run goes on with the next sample.
    """

    def __init__(self, loader: DataLoader[Any], rank: int, world_size: int) -> None:
        self._shard = _Shard(loader.dataset, loader.batch_size, loader.drop_last, rank, world_size)
        self._loader = DataLoader(
            self._shard,
            batch_size=loader.batch_size,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            generator=torch.Generator(),  # its own: see `IndexedSource._loader`
        )
        self._iterator: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        return self._shard.epoch

    def open(self) -> Iterator[Any]:
        if self._iterator is None:
            self._shard.seek()
            self._iterator = iter(self._loader)
        return self._iterator

    def close(self) -> None:
        pass  # nothing runs in the background, and the iterator can't be made again where it stood

    def state_dict(self) -> dict[str, Any]:
        shard = self._shard
        return {
            "kind": type(self).__name__,
            "epoch": shard.epoch,
            "position": shard.position,
            "dataset": shard.dataset.state_dict() if shard.is_stateful else None,
        }

    def rank_state_dict(self) -> dict[str, Any]:
        return {"epoch_rng": self._shard.epoch_rng}

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        shard = self._shard
        shard.epoch, shard.position = state["epoch"], state["position"]
        if shard.is_stateful and state["dataset"] is not None:
            shard.dataset.load_state_dict(state["dataset"])
            shard.is_placed = True
        elif rank_state is not None:
            shard.epoch_rng = rank_state["epoch_rng"]
        self._iterator = None


class _Shard(IterableDataset[Any]):
    """One rank's samples, epoch after epoch: of each world_size x batch_size consecutive ones the rank's slice."""

    def __init__(self, dataset: Any, batch_size: int | None, drop_last: bool, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.is_stateful = _is_stateful(dataset)
        self.is_placed = False
        """Whether `load_state_dict` has brought the data set to `position`."""
        self.epoch = 0
        self.position = 0
        """Samples of the epoch that were consumed, by all ranks together."""
        self.epoch_rng: dict[str, Any] | None = None
        """The random generators where the epoch began, from which what was seen can be drawn again."""
        size = batch_size or 1
        self._slice = slice(rank * size, (rank + 1) * size)
        self._global_batch = size * world_size
        self._drop_last, self._is_first = drop_last, rank == 0
        self._samples: Iterator[Any] | None = None

    def seek(self) -> None:
        """Begin the epoch, at `position`."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        num_replayed = 0 if self.is_placed else self.position
        if num_replayed and self.epoch_rng is not None:
            load_rng_state(self.epoch_rng, _CPU)
        elif not self.is_stateful:
            self.epoch_rng = rng_state(_CPU)
        self.is_placed = False
        self._samples = iter(self.dataset)
        _replay(self._samples, num_replayed, "samples", self._is_first)

    def __iter__(self) -> Iterator[Any]:
        group: list[Any] = []
        while True:
            assert self._samples is not None
            for sample in self._samples:
                self.position += 1
                group.append(sample)
                if len(group) == self._global_batch:
                    yield from group[self._slice]
                    group = []
            if self.position == 0:
                raise ValueError(_EMPTY if self.epoch == 0 else _EXHAUSTED)
            if self._drop_last:
                group = []
            self.epoch, self.position = self.epoch + 1, 0
            self.seek()


class IterableSource:
    """Batches from any iterable, each rank its own."""

    def __init__(self, iterable: Iterable[Any], is_first: bool) -> None:
        self._iterable, self._is_first = iterable, is_first
        self._is_stateful = _is_stateful(iterable)
        self._iterator: Iterator[Any] | None = None
        self._state: dict[str, Any] | None = None
        self._epoch_rng: dict[str, Any] | None = None
        self._epoch = self._position = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    def open(self) -> Iterator[Any]:
        if self._iterator is None:
            num_replayed = self._position if self._state is None else 0
            if self._state is not None:
                self._iterable.load_state_dict(self._state)  # type: ignore[attr-defined]
                self._state = None
            elif num_replayed and self._epoch_rng is not None:
                load_rng_state(self._epoch_rng, _CPU)
            self._begin_epoch()
            assert self._iterator is not None
            _replay(self._iterator, num_replayed, "batches", self._is_first)
        return self._batches()

    def _begin_epoch(self) -> None:
        if hasattr(self._iterable, "set_epoch"):
            self._iterable.set_epoch(self._epoch)
        if not self._is_stateful:
            self._epoch_rng = rng_state(_CPU)
        self._iterator = iter(self._iterable)

    def _batches(self) -> Iterator[Any]:
        while True:
            assert self._iterator is not None
            for batch in self._iterator:
                self._position += 1
                yield batch
            if self._position == 0:
                raise ValueError(_EMPTY if self._epoch == 0 else _EXHAUSTED)
            if self._iterator is self._iterable:
                raise ValueError(_EXHAUSTED)
            self._epoch, self._position = self._epoch + 1, 0
            self._begin_epoch()

    def close(self) -> None:
        if isinstance(self._iterable, DataLoader):  # it may have workers; anything else is kept where it stands
            if self._is_stateful and self._iterator is not None:
                self._state = self._iterable.state_dict()  # type: ignore[attr-defined]
            _end_workers(self._iterator)
            self._iterator = None
            if isinstance(self._iterable, DataLoaderShard | DataLoaderDispatcher):
                self._iterable.end()  # else it stays "active" in Accelerate's state, and upsets what comes after

    def state_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "epoch": self._epoch, "position": self._position}

    def rank_state_dict(self) -> dict[str, Any]:
        state = self._iterable.state_dict() if self._is_stateful else None  # type: ignore[attr-defined]
        return {"iterable": state, "epoch_rng": self._epoch_rng}

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self._state = self._epoch_rng = self._iterator = None
        if rank_state is not None:
            self._state = rank_state["iterable"] if self._is_stateful else None
            self._epoch_rng = rank_state["epoch_rng"]


_EMPTY = "`build_data_loader` returned data without a batch."
_EXHAUSTED = (
    "The data ended before `max_steps`, and can't be iterated again: it gave nothing the second time. Return an object"
    " whose `__iter__` starts anew, for example a DataLoader or a list, or lower `max_steps`."
)


def _end_workers(iterator: Any) -> None:
    """End the worker processes now. torch does so when the iterator is collected, but the traceback of an exception
    that came from it keeps it alive; it has no public way.
    """
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


def _is_stateful(data: Any) -> bool:
    """Whether `data` can say and restore its own position. Accelerate's loaders have the methods always, and a state
    only where they were made for it.
    """
    if isinstance(data, DataLoaderShard | DataLoaderDispatcher):
        return bool(data.use_stateful_dataloader)
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def _replay(iterator: Iterator[Any], count: int, unit: str, is_shown: bool) -> None:
    """Draw again what the run has already seen of this epoch."""
    if count == 0:
        return
    warnings.warn(
        f"The data has no `state_dict`, so the {count} {unit} that this run has already seen of the epoch are drawn"
        " again. Give the data set `state_dict` and `load_state_dict` to go there at once.",
        DataReplayWarning,
        stacklevel=2,
    )
    for _ in tqdm(
        itertools.islice(iterator, count), desc="drawing again", total=count, unit=unit, disable=not is_shown
    ):
        pass
