"""Data with an index: a `DataLoader` over a map-style data set, or a sequence of batches.

Sharded here. It goes to any position at once, at any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from .loaders import with_sampler
from .sampling import EndlessSampler, batch_keys, sample_key, sampling_of
from .workers import end_workers, start_iterator


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
            self.has_length = True
        except TypeError:
            is_empty = self.has_length = False
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

    @property
    def position(self) -> tuple[int, int]:
        return self._sampler.epoch, self._sampler.position

    def open(self) -> Iterator[Any]:
        # Iterators made here, and not in the generator, so that `close` can end them.
        self._iterator = start_iterator(self._loader()) if isinstance(self._data, DataLoader) else None
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
        end_workers(self._iterator)
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
