"""The stream of each rank's batches: endless, on the device, with a position that can be saved.

`sources.py` chooses the source for each kind of data. torch's own loader always fetches the data, and only its workers
prefetch. `look_ahead.py` takes one batch from them ahead of time.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import send_to_device

from ..errors import RankDisagreementError
from ..ranks import collectives
from ..records import map_nested
from .bad_samples import BadSampleCount
from .indexed import IndexedSource
from .iterable import IterableSource
from .look_ahead import LookAhead, has_to, looks_ahead
from .per_rank import SHARD_REMEDY, PerRank
from .shares import UNSEEDED
from .sources import source_of
from .streamed import SampledSource

DIFFERENT_SAMPLES = (
    "The ranks read different samples at the same place of the data, so the data seems to shard itself, and would be"
    f" sharded twice. {SHARD_REMEDY}"
)

_POSITION = struct.Struct("<qqQ")


class DataFeed:
    """Iterator over this rank's batches, on the device, epoch after epoch without end.

    Use it as a context manager: leaving it ends the loader's workers.

    Args:
        loader: The user's data.
        seed: Seed of the order, in [0, 2^31).
        rank: This rank.
        world_size: Number of ranks.
        device: The device for the batches.
        non_blocking: Whether the copy to the device is asynchronous even if the loader has no `pin_memory`.

    Raises:
        TypeError: `loader` is not iterable.
        ValueError: It is empty.
    """

    def __init__(
        self,
        loader: Any,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        non_blocking: bool = False,
    ) -> None:
        self._source = source_of(loader, seed, rank, world_size)
        self._loader = loader
        self._was_each_ranks_own = world_size == 1 and isinstance(self._source, SampledSource)
        self._compares = world_size > 1
        loader = loader.loader if isinstance(loader, PerRank) else loader
        self._next: Any = None
        self.non_blocking = non_blocking
        is_prepared = isinstance(loader, DataLoaderShard | DataLoaderDispatcher)
        self._transfer = None if is_prepared and loader.device is not None else transfer(loader, device, non_blocking)
        self._ahead = LookAhead(device, self._transfer) if looks_ahead(device) else None

    @property
    def epoch(self) -> int:
        """The epoch that the run is in, from 0."""
        return self._source.epoch

    @property
    def num_epochs_done(self) -> int:
        """Number of completed epochs on this rank. If the data has no length, its end is noticed only with the first
        batch after it.
        """
        return self._source.num_epochs_done

    def num_batches_left(self, num_epochs: int) -> int | None:
        """Number of this rank's micro-batches from the current position to the end of `num_epochs` epochs. None: the
        data has no length. Call on every rank.
        """
        return self._source.num_batches_left(num_epochs)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and its consumed samples. (0, 0) if each rank has its own data."""
        return self._source.position

    def position_checksum(self) -> int:
        """Checksum of `position` and `checksum`; if each rank has its own data, of this rank's epoch and batch."""
        source = self._source
        epoch, position = source.own_position if isinstance(source, IterableSource | SampledSource) else source.position
        return zlib.crc32(_POSITION.pack(epoch, position, source.checksum))

    @property
    def checksum(self) -> int:
        """Checksum of the epoch's order, or of its first samples. It must be the same on all ranks."""
        return self._source.checksum

    @property
    def has_epochs(self) -> bool:
        """Whether the data is known to end: it has a length, or it has ended before."""
        return self._source.has_length or self.epoch > 0

    @property
    def bad_samples(self) -> BadSampleCount | None:
        """The count of samples that could not be read. None: such a sample ends the run."""
        return self._source.bad_samples if isinstance(self._source, IndexedSource) else None

    def records(self) -> dict[str, Any]:
        """Records of the data for the log, the same on all ranks."""
        return self._source.records() if isinstance(self._source, IndexedSource) else {}

    def repeat_first(self, num_batches: int) -> None:
        """Let each epoch be the first batches of the first epoch, if the data has an index. Call before `start`."""
        if isinstance(self._source, IndexedSource):
            self._source.repeat_first(num_batches)

    @property
    def is_started(self) -> bool:
        """Whether a `train` is drawing from it."""
        return self._next is not None

    def start(self) -> None:
        """Create the iterator, at the current position. Call on every rank. The random generators may be restored only
        after it.

        Raises:
            RankDisagreementError: The ranks read different samples at the same place of the order.
        """
        batches = self._source.open()
        if self._compares:
            text = UNSEEDED if isinstance(self._source, SampledSource) else DIFFERENT_SAMPLES
            check_same_data(self._source.compared_checksum(), text)
            self._compares = False
        self._next = batches.__next__

    def __next__(self) -> Any:
        if self._ahead is None or self._ahead.is_empty:
            batch = self._next()
            self._source.advance()
            return batch if self._transfer is None else self._transfer(batch)
        return self._ahead.take(self._source.advance)

    @property
    def can_look_ahead(self) -> bool:
        """Whether the workers have the next batch ready, and it can be copied while the device works."""
        return self._ahead is not None and self._ahead.is_empty and self._source.has_ready_batch()

    def look_ahead(self) -> None:
        """Fetch the next batch, and start to copy it to the device. Call only if `can_look_ahead`. The
        batch counts as consumed when it is drawn, and an exception from fetching it is raised then.
        """
        assert self._ahead is not None
        self._ahead.fetch(self._next)

    def close(self) -> None:
        """End the iterator and its workers. `start` continues at the same position."""
        self._next = None
        if self._ahead is not None:
            self._ahead.drop()
        self._source.close()

    def __enter__(self) -> DataFeed:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on all ranks."""
        return self._source.state_dict()

    def rank_state_dict(self) -> dict[str, Any] | None:
        """The state that belongs to this rank only, if any."""
        return self._source.rank_state_dict()

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        """Go to a saved position. `rank_state` is None if another number of processes saved it."""
        if state["kind"] == "IterableSource" and self._was_each_ranks_own:  # saved by trainloop 0.1.0
            self._source = IterableSource(self._loader, 0, 1)
        if state["kind"] != type(self._source).__name__:
            raise ValueError(
                f"The data position was saved by a {state['kind']}, but `build_data_loader` now gives a"
                f" {type(self._source).__name__}. Resume with the same kind of data, or let"
                ' the script\'s begin at its first epoch: `CheckpointingHook(on_resume=["data"])`.'
            )
        self._source.load_state_dict(state, rank_state)


def check_same_data(own: int | None, text: str = DIFFERENT_SAMPLES) -> bool:
    """Raise if the ranks have fetched different samples from the same place of the order. Call on every rank.

    Args:
        own: Checksum of this rank's samples. None: no rank's are compared.
        text: Text of the error.

    Returns:
        Whether the samples were compared.

    Raises:
        RankDisagreementError: On every rank.
    """
    is_unknown, largest, minus_smallest = collectives.start_max([own is None, own or 0, -(own or 0)])()
    if not is_unknown and largest != -minus_smallest:
        raise RankDisagreementError(text)
    return not is_unknown


def transfer(loader: Any, device: torch.device, non_blocking: bool = False) -> Callable[[Any], Any] | None:
    """A function that moves a batch of this loader to the device. None: the batch is already there."""
    if device.type == "cpu":
        return None
    # Asynchronous if the user's loader has pinned the batch. From pageable memory the copy blocks anyway.
    is_pinned = bool(getattr(loader, "pin_memory", False))
    send = partial(send_to_device, device=device, non_blocking=non_blocking or is_pinned)
    return partial(map_nested, send, is_leaf=has_to)
