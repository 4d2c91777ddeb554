"""Which part of a stream a rank reads: its share, where the data set can give it one, else everything."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .checksums import checksum


class Shardable(Protocol):
    """A stream that gives each rank its share before anything is read. Return a `DataLoader` of it.

    The trainer calls `shard` once, before the first epoch, on every rank and in a run of one process too. Then each
    rank reads its share only, and begins its next epoch when its share ends. So give the ranks shares of equal size, or
    the samples of the smaller ones are seen more often. `__len__`, if there is one, is the length of the share. In
    worker processes, `__iter__` splits the share over the workers.

    To shuffle the files, give the data set `set_epoch`: every rank and worker shuffles the whole list by the epoch, and
    takes its part after that. `integrations/data/web_dataset.py` is an example.

    If the data set has `state_dict` and `load_state_dict` too, a resume goes to the position at once. Otherwise it
    reads the seen part of the epoch again.
    """

    def shard(self, rank: int, world_size: int) -> Any:
        """Return the data set of this rank's share; or change this one so that it reads the share, and return None.

        Args:
            rank: This rank.
            world_size: Number of ranks. All shares together are the data.
        """


@dataclass(frozen=True)
class Share:
    """What a rank reads."""

    dataset: Any
    is_own: bool
    """Whether other ranks read other samples. Otherwise every rank reads all of them."""
    obstacle: str = ""
    """Why a data set that has shards gives no share."""


def share_of(dataset: Any, rank: int, world_size: int) -> Share:
    """Ask a stream for this rank's share.

    Raises:
        TypeError: `shard` returned something that is not iterable.
    """
    if is_of_hugging_face(dataset):
        return _share_of_hugging_face(dataset, rank, world_size)
    if not _has_protocol(dataset):
        return Share(dataset, is_own=False)
    share = dataset.shard(rank=rank, world_size=world_size)
    share = dataset if share is None else share
    if not hasattr(share, "__iter__"):
        raise TypeError(
            f"`{type(dataset).__name__}.shard` must return an iterable data set or None, but returned"
            f" {type(share).__name__}."
        )
    return Share(share, is_own=world_size > 1)


def _has_protocol(dataset: Any) -> bool:
    """Whether it has a `shard` of ours. Others have a method of this name that takes other arguments."""
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

    if world_size == 1 or getattr(dataset, "_distributed", None) is not None:  # the script has split it
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
    """Checksum of the generators that a stream of `datasets` shuffles with. They differ in each process if the script
    gives no seed. 0: it has none.
    """
    if not is_of_hugging_face(dataset):
        return 0
    import numpy

    generators = [
        value for part in _parts(dataset) for value in vars(part).values() if isinstance(value, numpy.random.Generator)
    ]
    return checksum([generator.bit_generator.state for generator in generators]) if generators else 0


def lost_by_state(dataset: Any) -> str:
    """What the `state_dict` of a stream does not contain, although a resume needs it; "" if nothing is known."""
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
    """Whether `datasets` can load a worker's state. It builds the stream for all workers first, and the state must fit
    to that. With `shuffle`, and fewer files a worker than `max_buffer_input_shards`, it doesn't (`datasets` 5.2).

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
    """The steps of a stream of `datasets`, from the last one to the files."""
    left = [getattr(dataset, "_ex_iterable", None)]
    while left:
        part = left.pop()
        if part is not None:
            yield part
            left += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
