"""Chooses the source for the data that the user returned.

- `IndexedSource`: data with an index.
- `SampledSource`: a `DataLoader` over an `IterableDataset`, or any other iterable of batches.
- `IterableSource`: the result of `per_rank`, or a loader of Accelerate. Each rank has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, DistributedSampler

from ..errors import describe
from .indexed import IndexedSource
from .iterable import IterableSource
from .loaders import is_map_style, iterates_as_torchs
from .per_rank import PerRank
from .stream_reading import as_it_is
from .streamed import SampledSource


class Source(Protocol):
    """One kind of data, on one rank."""

    @property
    def epoch(self) -> int:
        """The epoch of the batch that was yielded last, from 0."""

    @property
    def num_epochs_done(self) -> int:
        """Number of completed epochs. If the data has no length, its end is noticed with the first batch after it."""

    def num_batches_left(self, num_epochs: int) -> int | None:
        """Number of this rank's batches from the current position until `num_epochs` epochs are over on every rank.
        None: the data has no length. Call on every rank.
        """

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and its consumed samples, the same on all ranks. (0, 0) if each rank reads its own data."""

    @property
    def checksum(self) -> int:
        """Checksum of the epoch's order, or of its first samples. It must be the same on all ranks. 0: no check."""

    has_length: bool
    """Whether the length of an epoch is known."""

    def open(self) -> Iterator[Any]:
        """Endless batches, from the current position on. The position moves only with `advance`."""

    def advance(self) -> None:
        """Count the oldest batch that was fetched but not consumed as consumed."""

    def has_ready_batch(self) -> bool:
        """Whether the workers have a batch ready. It can then be fetched early: without waiting, and without a change
        in the generators of this process or the state of the data.
        """

    def compared_checksum(self) -> int | None:
        """Checksum of samples that are the same on all ranks if all have the same data. None: there are no such
        samples. Call it once, after `open` and before the first batch.
        """

    def close(self) -> None:
        """End all background work. `open` may be called again."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as small values that are the same on all ranks."""

    def rank_state_dict(self) -> dict[str, Any] | None:
        """The state that belongs to this rank only."""

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        """Go to a saved position. `rank_state` is None if another number of processes saved it."""


def source_of(loader: Any, seed: int, rank: int, world_size: int) -> Source:
    """Choose the source for the return value of `build_data_loader`.

    Raises:
        TypeError: `loader` is not an iterable of batches.
        ValueError: It can't be sharded.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"`build_data_loader` must return a DataLoader or another iterable of batches, but returned"
            f" {describe(loader)}."
        )
    if isinstance(loader, str | bytes | dict):
        raise TypeError(f"`build_data_loader` must return an iterable of batches, but returned {describe(loader)}.")
    if isinstance(loader, PerRank):
        return IterableSource(loader.loader, rank, world_size)
    if is_map_style(loader):
        return IndexedSource(loader, seed, rank, world_size)
    if isinstance(loader, DataLoader) and iterates_as_torchs(loader):
        return SampledSource(loader, seed, rank, world_size)
    is_prepared = isinstance(loader, DataLoaderShard | DataLoaderDispatcher)
    shards_itself = is_prepared or isinstance(getattr(loader, "sampler", None), DistributedSampler)
    if world_size > 1 and isinstance(loader, DataLoader) and not shards_itself:
        raise ValueError(
            f"{type(loader).__name__} iterates in a way of its own, so it can't be sharded over {world_size}"
            " processes: each would train on the same batches. Return a torch DataLoader. Or, if each rank's loader"
            " yields its own part of the data, return `trainloop.data.per_rank(loader)`."
        )
    if isinstance(loader, DataLoader) or is_prepared:
        return IterableSource(loader, rank, world_size)
    if isinstance(loader, Sequence):
        return IndexedSource(loader, seed, rank, world_size)
    batches: DataLoader[Any] = DataLoader(loader, batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type]
    return SampledSource(batches, seed, rank, world_size)
