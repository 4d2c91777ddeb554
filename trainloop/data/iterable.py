"""Any other iterable of batches, including a loader that Accelerate prepared. Each rank iterates its own."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader

from ..errors import DataReplayWarning
from ..rng import load_rng_state, rng_state
from ..terminal import Bar
from .order import is_stateful, length_of
from .streamed import EMPTY, EXHAUSTED, most_of_ranks
from .workers import end_workers, start_iterator

_CPU = torch.device("cpu")


class IterableSource:
    """Batches from any iterable. Each rank iterates its own."""

    has_length = False
    checksum = 0

    def __init__(self, iterable: Iterable[Any], rank: int, world_size: int) -> None:
        self._iterable, self._is_first, self._world_size = iterable, rank == 0, world_size
        self._is_stateful = _is_stateful(iterable)
        self._iterator: Iterator[Any] | None = None
        self._state: dict[str, Any] | None = None
        self._epoch_rng: dict[str, Any] | None = None
        self._epoch = self._position = 0
        self._length = length_of(iterable)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def num_epochs_done(self) -> int:
        return self._epoch + (self._length is not None and self._position >= self._length)

    def num_batches_left(self, num_epochs: int) -> int | None:
        own = None if self._length is None else max(0, (num_epochs - self._epoch) * self._length - self._position)
        return most_of_ranks(own)

    @property
    def position(self) -> tuple[int, int]:
        return 0, 0  # the ranks may have different numbers of batches an epoch

    @property
    def own_position(self) -> tuple[int, int]:
        """This rank's epoch, and the number of batches that it has drawn of the epoch."""
        return self._epoch, self._position

    def open(self) -> Iterator[Any]:
        if self._iterator is None:
            num_replayed = self._position if self._state is None else 0
            before = rng_state(_CPU)
            if self._state is not None:
                self._iterable.load_state_dict(self._state)  # type: ignore[attr-defined]
                self._state = None
            elif num_replayed and self._epoch_rng is not None:
                load_rng_state(self._epoch_rng, _CPU)
            self._begin_epoch()
            if num_replayed:
                assert self._iterator is not None
                _replay(self._iterator, num_replayed, self._is_first)
                load_rng_state(before, _CPU)  # otherwise the run would draw the same random numbers again
        return self._batches()

    def advance(self) -> None:
        self._position += 1

    def has_ready_batch(self) -> bool:
        return False  # fetching ahead would change the loader's own position, and perhaps this process's generators

    def compared_checksum(self) -> int | None:
        return None

    def _begin_epoch(self) -> None:
        set_epoch(self._iterable, self._epoch)
        if not self._is_stateful:
            self._epoch_rng = rng_state(_CPU)
        self._iterator = start_iterator(self._iterable)

    def _batches(self) -> Iterator[Any]:
        while True:
            assert self._iterator is not None
            for batch in self._iterator:  # noqa: UP028 -- `yield from` would close the user's iterator with this one
                yield batch
            if self._position == 0:
                raise ValueError(EMPTY if self._epoch == 0 else EXHAUSTED)
            if self._iterator is self._iterable:
                raise ValueError(EXHAUSTED)
            self._epoch, self._position = self._epoch + 1, 0
            self._begin_epoch()

    def close(self) -> None:
        is_prepared = isinstance(self._iterable, DataLoaderShard | DataLoaderDispatcher)
        if not is_prepared and not (isinstance(self._iterable, DataLoader) and self._iterable.num_workers):
            return  # no background work, so keep the iterator at its position
        if self._is_stateful and self._iterator is not None:
            self._state = self._iterable.state_dict()  # type: ignore[attr-defined]
        end_workers(self._iterator)
        self._iterator = None
        if is_prepared:
            self._iterable.end()  # type: ignore[attr-defined]  # else it stays "active" in Accelerate's state, and upsets what comes after

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "epoch": self._epoch,
            "position": self._position,
            "world_size": self._world_size,
        }

    def rank_state_dict(self) -> dict[str, Any]:
        state = self._state
        if self._is_stateful and state is None:
            state = self._iterable.state_dict()  # type: ignore[attr-defined]
        return {"epoch": self._epoch, "position": self._position, "iterable": state, "epoch_rng": self._epoch_rng}

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        own = state if rank_state is None else {**state, **rank_state}
        self._epoch, self._position = own["epoch"], own["position"]
        self._state = self._epoch_rng = self._iterator = None
        if rank_state is not None:
            self._state = rank_state["iterable"] if self._is_stateful else None
            self._epoch_rng = rank_state["epoch_rng"]
        elif self._position:
            num_saved, num_seen = state.get("world_size", "another number of"), self._position
            warnings.warn(
                f"Each rank reads its own part of the data. The position was saved by {num_saved} processes, and this"
                f" run has {self._world_size}. Each rank skips {num_seen} batches, as many as each had seen of its old"
                " part. In this epoch, some batches are seen twice and others never. For an exact resume, keep the"
                " number of processes.",
                DataReplayWarning,
                stacklevel=2,
            )


def set_epoch(loader: Any, epoch: int) -> None:
    """Pass the epoch to a loader that is used unchanged, and to its samplers and data set."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (batch_sampler, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    parts: list[Any] = [loader, *samplers, getattr(loader, "dataset", None)]
    for part in {id(part): part for part in parts}.values():
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _is_stateful(data: Any) -> bool:
    """Whether it can save its position. Accelerate's loaders can only with `use_stateful_dataloader`."""
    if isinstance(data, DataLoaderShard | DataLoaderDispatcher):
        return bool(data.use_stateful_dataloader)
    return is_stateful(data)


def _replay(iterator: Iterator[Any], count: int, is_shown: bool) -> None:
    """Draw again the batches of this epoch that the run has already seen."""
    warnings.warn(
        f"The data has no `state_dict`. To return to its position in the epoch, the run reads {count} batches again."
        " Give the data set `state_dict` and `load_state_dict` to avoid this.",
        DataReplayWarning,
        stacklevel=2,
    )
    with Bar("reading again", count, "batch", is_drawn=is_shown) as bar:
        for _ in itertools.islice(iterator, count):
            bar.update()
