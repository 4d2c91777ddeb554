"""Measures in the first steps what it costs that every rank reads the whole stream, and reports it once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import RedundantReadWarning

_NUM_MEASURED = 32  # number of batches
_LIMIT = 0.01  # share of a step


class ReadCost:
    """Measures how long a rank waits for a stream of which every rank reads all samples.

    Args:
        world_size: Number of ranks. Each rank uses 1/`world_size` of the samples that it reads.
        obstacle: Why the data cannot be read in shares. It is reported whatever the cost.
    """

    def __init__(self, world_size: int, obstacle: str) -> None:
        self._world_size, self._obstacle = world_size, obstacle
        self._is_told = False

    def measured(self, batches: Iterator[Any], epoch: Callable[[], int]) -> Iterator[Any]:
        """The batches. Reads the clock twice for each of the first batches, and never after that."""
        if not self._is_told:
            yield next(batches)  # not measured: workers start with it, and a resume reads again
            waited, since, num_measured = 0.0, time.perf_counter(), 0
            while num_measured < _NUM_MEASURED:
                before, start = epoch(), time.perf_counter()
                batch = next(batches)
                end = time.perf_counter()
                if epoch() == before:
                    waited, num_measured = waited + end - start, num_measured + 1
                else:
                    since += end - start  # not measured: a new epoch starts workers
                yield batch
            self._tell(waited * (1 - 1 / self._world_size) / (time.perf_counter() - since))
        yield from batches

    def _tell(self, share: float) -> None:
        self._is_told = True
        if share <= _LIMIT and not self._obstacle:
            return
        remedy = (
            "Give the data set `shard(rank, world_size)`, so that each process reads its own part only. Or shard the"
            " files yourself and return `trainloop.data.per_rank(loader)`."
        )
        warnings.warn(
            f"Each of {self._world_size} processes reads all of the data but uses only its share. Reading the rest"
            f" takes {share:.1%} of the time of a step. {self._obstacle or remedy}",
            RedundantReadWarning,
            stacklevel=2,
        )
