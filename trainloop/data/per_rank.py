"""Data that shards itself: each rank trains on the batches of its own loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import describe

SHARD_REMEDY = (
    "If the data shards itself, return `trainloop.data.per_rank(loader)`: each rank then trains on what its own loader"
    " yields. Else give every rank the same data in the same order; the trainer shards it."
)


class PerRank:
    """The return value of `per_rank`."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def per_rank(loader: Iterable[Any]) -> PerRank:
    """Mark data that shards itself, for `build_data_loader` and `build_eval_data_loader`.

    The trainer uses it unchanged, on every rank. Examples are a loader with your own sampler that yields
    `range(rank, n, world_size)`, a data set that was split by `split_dataset_by_node`, or a WebDataset pipeline.

    - Training: each rank iterates its own loader. When it ends, the rank begins its next epoch, independently of the
      other ranks. `set_epoch` of the loader, its samplers and its data set is called with the number of the epoch.
    - Evaluation: every batch of every rank counts once. Ranks that end early repeat a batch that doesn't count.
    - A resume at the same number of processes is exact, by the loader's `state_dict` and `load_state_dict`. Without
      them, the batches of the epoch that were seen are drawn again, with a `trainloop.DataReplayWarning`.
    - A resume at another number of processes cannot be exact: each rank skips as many batches of its new part as each
      rank had seen of its old part. A `trainloop.DataReplayWarning` gives the number.

    Args:
        loader: An iterable of this rank's batches, for example a DataLoader.

    Raises:
        TypeError: `loader` is not iterable.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes | dict):
        raise TypeError(f"`loader` must be an iterable of batches, but is {describe(loader)}.")
    return PerRank(loader)
