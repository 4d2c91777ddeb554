"""Data that shards itself: each rank trains on what its own loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import describe

SHARD_REMEDY = (
    "If the data shards itself, return `trainloop.data.per_rank(loader)`: each rank then trains on what its own loader"
    " yields. Else give every rank the same data in the same order; the trainer shards it."
)


class PerRank:
    """What `per_rank` returns."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def per_rank(loader: Iterable[Any]) -> PerRank:
    """Mark data that shards itself, for `build_data_loader` and `build_eval_data_loader`.

    The trainer takes it as it is, on every rank. Examples are a loader with a sampler of your own that yields
    `range(rank, n, world_size)`, a data set that `split_dataset_by_node` has split, or a WebDataset pipeline.

    - Training: each rank iterates its own loader. When it ends, the rank begins its next epoch, whatever the others do.
      `set_epoch` of the loader, its samplers and its data set is called with the number of the epoch.
    - Evaluation: every batch of every rank counts once. Ranks that end early run a batch again that does not count.
    - A resume at the same number of processes is exact, by the loader's `state_dict` and `load_state_dict`. Without
      them the seen batches of the epoch are drawn again, with a `trainloop.DataReplayWarning`.
    - A resume at another number of processes cannot be exact: each rank skips as many batches of its new part as each
      rank had seen of its old one. A `trainloop.DataReplayWarning` says how many.

    Args:
        loader: An iterable of this rank's batches, for example a DataLoader.

    Raises:
        TypeError: `loader` is not iterable.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes | dict):
        raise TypeError(f"`loader` must be an iterable of batches, but is {describe(loader)}.")
    return PerRank(loader)
