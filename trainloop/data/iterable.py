"""Data without an index: it goes to a position by its own `state_dict`, or by drawing the seen part of the epoch again.

- `SampledSource`: a `DataLoader` without workers over an `IterableDataset`. Sharded here.
- `IterableSource`: anything else that yields batches, including a loader that Accelerate prepared. Each rank reads its
  own batches.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from ..errors import DataReplayWarning
from ..rng import load_rng_state, rng_state
from .workers import end_workers, start_iterator

_CPU = torch.device("cpu")
_EMPTY = "`build_data_loader` returned data without a batch."
_EXHAUSTED = (
    "The data ended before `max_steps`, and can't be iterated again: it gave nothing the second time. Return an object"
    " whose `__iter__` starts anew, for example a DataLoader or a list, or lower `max_steps`."
)


class SampledSource:
    """Batches from a `DataLoader` without workers over an `IterableDataset`.

    Every rank reads the same samples and takes its own slice of each global batch. So a run can continue with the next
    sample at any number of processes.
    """

    has_length = False

    def __init__(self, loader: DataLoader[Any], rank: int, world_size: int) -> None:
        self._shard = _Shard(loader.dataset, loader.batch_size, loader.drop_last, rank, world_size)
        self._loader = DataLoader(
            self._shard,
            batch_size=loader.batch_size,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            generator=torch.Generator(),  # its own: see `with_sampler`
        )
        self._iterator: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        return self._shard.epoch

    @property
    def position(self) -> tuple[int, int]:
        return self._shard.epoch, self._shard.position

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
    """One rank's samples, epoch after epoch: its slice of each world_size x batch_size consecutive samples."""

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
    """Batches from any iterable. Each rank iterates its own."""

    has_length = False

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

    @property
    def position(self) -> tuple[int, int]:
        return 0, 0  # the ranks may have unequally many batches an epoch

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
        self._iterator = start_iterator(self._iterable)

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
            end_workers(self._iterator)
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


def _is_stateful(data: Any) -> bool:
    """Whether `data` can save and restore its own position.

    Accelerate's loaders always have the methods, but they only work with `use_stateful_dataloader`.
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
