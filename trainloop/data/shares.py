"""The part of a stream that a rank reads: its share if the data set can provide one, else everything."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .checksums import checksum


class Shardable(Protocol):
    """A stream that gives each rank its share before anything is read. Return a `DataLoader` of it.

    The trainer calls `shard` before the first epoch, on every rank, and in a single process too. Then each rank
    reads only its share, and begins its next epoch when the share ends. So give the ranks shares of equal size;
    otherwise the samples of smaller shares are seen more often. `__len__`, if defined, is the length of the share. In
    worker processes, `__iter__` must split the share over the workers.

    In an evaluation too, each rank reads only its share. There the shares may have any size, and each sample counts
    once. `shard` is called on a shallow copy of the data set. If it raises a ValueError, every rank reads everything.

    To shuffle the files, give the data set a `set_epoch`: every rank and worker shuffles the whole list by the epoch,
    and takes its part after that. `integrations/data/web_dataset.py` is an example.

    If the data set also has `state_dict` and `load_state_dict`, a resume goes to the position directly. Otherwise it
    reads again the part of the epoch that was seen.
    """

    def shard(self, rank: int, world_size: int) -> Any:
        """Return a data set with this rank's share. Or change this one so that it reads the share, and return None.

        Args:
            rank: This rank.
            world_size: Number of ranks. Their shares together must be all of the data.
        """


@dataclass(frozen=True)
class Share:
    """The data that a rank reads."""

    dataset: Any
    is_own: bool
    """Whether other ranks read other samples. Otherwise every rank reads all samples."""
    obstacle: str = ""
    """Why a data set with shards can't provide a share."""


_MARK = "_trainloop_share"
"""Attribute of a data set that has become a share itself. Training and evaluation may use the same one."""


def share_of(dataset: Any, rank: int, world_size: int) -> Share:
    """Get this rank's share of a stream. May be called again.

    Raises:
        TypeError: `shard` returned something that is not iterable.
    """
    if is_of_hugging_face(dataset):
        return _share_of_hugging_face(dataset, rank, world_size)
    if not has_protocol(dataset):
        return Share(dataset, is_own=False)
    if getattr(dataset, _MARK, None) == (rank, world_size):
        return Share(dataset, is_own=world_size > 1)
    share = dataset.shard(rank=rank, world_size=world_size)
    if share is None:
        share = dataset
        object.__setattr__(dataset, _MARK, (rank, world_size))
    if not hasattr(share, "__iter__"):
        raise TypeError(
            f"`{type(dataset).__name__}.shard` must return an iterable data set or None, but returned"
            f" {type(share).__name__}."
        )
    return Share(share, is_own=world_size > 1)


def has_protocol(dataset: Any) -> bool:
    """Whether the data set has our `shard` method. Other libraries use the name with other arguments."""
    shard = getattr(dataset, "shard", None)
    if not callable(shard):
        return False
    try:
        inspect.signature(shard).bind(rank=0, world_size=1)
    except (TypeError, ValueError):
        return False
    return True


# ---------------------------------------------------------------------- Hugging Face `datasets`


def is_of_hugging_face(dataset: Any) -> bool:
    """Whether it is an `IterableDataset` of `datasets`."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(dataset, module.IterableDataset)


def _share_of_hugging_face(dataset: Any, rank: int, world_size: int) -> Share:
    from datasets.distributed import split_dataset_by_node

    if world_size == 1 or getattr(dataset, "_distributed", None) is not None:  # the script has already split it
        return Share(dataset, is_own=False)
    num_shards = dataset.num_shards
    if num_shards % world_size:
        return Share(
            dataset,
            is_own=False,
            obstacle=f"The data set has {num_shards} shards, and {world_size} processes can't share them evenly. Give"
            f" it a multiple of {world_size}, for example with `reshard()`, `to_iterable_dataset(num_shards=…)` or"
            " other files.",
        )
    return Share(split_dataset_by_node(dataset, rank=rank, world_size=world_size), is_own=True)


UNSEEDED = (
    "The ranks shuffle the data set in different ways, so their shares overlap. Give it a seed:"
    " `dataset.shuffle(seed=…)`."
)


def shuffle_checksum(dataset: Any) -> int:
    """Checksum of the random generators with which a `datasets` stream shuffles. If the script gives no seed, they
    differ in each process. 0: it has none.
    """
    if not is_of_hugging_face(dataset):
        return 0
    import numpy

    generators = [
        value for part in _parts(dataset) for value in vars(part).values() if isinstance(value, numpy.random.Generator)
    ]
    return checksum([generator.bit_generator.state for generator in generators]) if generators else 0


def lost_by_state(dataset: Any) -> str:
    """A text about data that a resume needs but that a stream's `state_dict` lacks. "": nothing is known to be lost."""
    if not is_of_hugging_face(dataset):
        return ""
    largest = max((getattr(part, "buffer_size", 1) for part in _parts(dataset)), default=1)
    if largest <= 1:
        return ""
    return (
        f"The `state_dict` of `datasets` leaves out its shuffle buffer of {largest} samples, and the resumed run fills"
        f" the buffer anew. So up to {largest} samples of each reader are never seen in this epoch, and some may be"
        " seen twice. For an exact resume, shuffle the files only: `shuffle(seed=…, buffer_size=1)`."
    )


def can_be_loaded(fresh: Any, state: Any) -> bool:
    """Whether `datasets` can load a worker's state. It first builds the stream for all workers, and the state must fit
    that stream. With `shuffle`, and fewer files per worker than `max_buffer_input_shards`, it doesn't (`datasets` 5.2).

    Args:
        fresh: The state of the stream before it was split over the workers.
        state: The state in a worker.
    """
    if isinstance(fresh, Mapping) and isinstance(state, Mapping):
        return all(can_be_loaded(fresh[key], state[key]) for key in fresh.keys() & state.keys())
    if isinstance(fresh, list) and isinstance(state, list):
        return len(fresh) == len(state) and all(map(can_be_loaded, fresh, state))
    return True


def _parts(dataset: Any) -> Iterator[Any]:
    """The steps of a `datasets` stream, from the last one to the files."""
    left = [getattr(dataset, "_ex_iterable", None)]
    while left:
        part = left.pop()
        if part is not None:
            yield part
            left += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
