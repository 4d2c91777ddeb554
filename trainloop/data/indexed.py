"""Data with an index: a `DataLoader` over a map-style data set, or a sequence of batches.

It is sharded here. It can go to any position directly, at any number of processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from ..rng import derived_seed, lent_rng
from .bad_samples import BadSample, BadSampleCount, CollateWithBadSamples, Fetched, SkipBadSamples
from .checksums import sample_checksum
from .loaders import with_sampler
from .mixture import Mixture
from .order import DatasetOrder, is_stateful, sampler_name
from .sampling import EndlessSampler, batch_keys, sample_key, sampling_of
from .workers import end_workers, has_ready_batch, start_iterator


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
        holds_batches = isinstance(data, DataLoader) and batch_size is None and data.batch_sampler is not None
        key = None
        if isinstance(data, DataLoader) and data.num_workers > 0:
            key = batch_keys if holds_batches else sample_key
        dataset = data.dataset if isinstance(data, DataLoader) else None
        self.bad_samples = BadSampleCount(dataset.max_failures) if isinstance(dataset, SkipBadSamples) else None
        """The count of bad samples. None: a sample that cannot be read ends the run."""
        self._given_sampler = sampler
        self._sampler = EndlessSampler(
            sampler,
            batch_size,
            drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
            key=key,
            holds_batches=holds_batches,
            with_substitutes=self.bad_samples is not None,
        )
        self._compares = world_size > 1
        """Whether the next `open` also fetches the samples that the ranks compare."""
        self._iterator: Iterator[Any] | None = None
        self._bad_samples_ahead: deque[list[BadSample]] = deque()
        """Bad samples of each batch that was fetched but not consumed."""

    @property
    def epoch(self) -> int:
        return self._sampler.epoch

    @property
    def num_epochs_done(self) -> int:
        return self._sampler.epoch + self._sampler.ends_epoch

    def repeat_first(self, num_batches: int) -> None:
        """Let each epoch be the first batches of the first epoch. `num_batches` counts batches of one process."""
        self._sampler.repeat_first(num_batches)
        self.has_length = True

    def num_batches_left(self, num_epochs: int) -> int | None:
        return self._sampler.num_batches_left(num_epochs)

    @property
    def position(self) -> tuple[int, int]:
        return self._sampler.epoch, self._sampler.position

    @property
    def checksum(self) -> int:
        return self._sampler.checksum

    def open(self) -> Iterator[Any]:
        # The iterator is created here, not in the generator, so that `close` can end it.
        if isinstance(self._data, DataLoader):
            sampler = itertools.chain(self._items_to_compare(), self._sampler)
            loader = with_sampler(self._data, sampler, self._sampler.seed)
            if isinstance(self._data.dataset, SkipBadSamples):
                loader.collate_fn = CollateWithBadSamples(loader.collate_fn, self._data.dataset)
            self._iterator = start_iterator(loader)
        self._bad_samples_ahead.clear()
        return self._batches(self._iterator)

    def compared_checksum(self) -> int | None:
        checksums = []
        for item in self._items_to_compare():
            with lent_rng(derived_seed(self._sampler.seed, "compared")):
                batch = self._data[item] if self._iterator is None else next(self._iterator)  # type: ignore[index]
            checksums.append(sample_checksum([batch.batch if isinstance(batch, Fetched) else batch]))
        self._compares = False
        return checksums[0] if checksums[:1] == checksums[1:] else None

    def _items_to_compare(self) -> list[Any]:
        """The item that rank 0 draws next, twice, on every rank. If all ranks have the same data, it gives the same
        samples. It is fetched twice, because a data set with its own random generators gives other samples each time.
        """
        return [self._sampler.first_of_rank_zero()] * 2 if self._compares else []

    def _batches(self, iterator: Iterator[Any] | None) -> Iterator[Any]:
        if iterator is None:
            for index in self._sampler:
                yield self._data[index]  # type: ignore[index]
            return
        for batch in iterator:
            if self.bad_samples is not None:
                self._bad_samples_ahead.append(batch.bad_samples)
                batch = batch.batch
            yield batch

    def advance(self) -> None:
        self._sampler.advance()
        if self.bad_samples is not None:
            self.bad_samples.new += self._bad_samples_ahead.popleft()

    def has_ready_batch(self) -> bool:
        return has_ready_batch(self._iterator)

    def close(self) -> None:
        end_workers(self._iterator)
        self._iterator = None

    def records(self) -> dict[str, Any]:
        """Records of the data for the log, the same on all ranks."""
        records: dict[str, Any] = {}
        if self.bad_samples is not None:
            records["bad_samples"] = float(self.bad_samples.total)
        given, sampler = self._given_sampler, self._sampler
        if isinstance(given, DatasetOrder) and isinstance(given.dataset, Mixture):
            records["share"] = given.dataset.shares(sampler.seed, sampler.epoch, sampler.position)
        return {"data": records} if records else {}

    def state_dict(self) -> dict[str, Any]:
        sampler = self._sampler
        return {
            "kind": type(self).__name__,
            "seed": sampler.seed,
            "epoch": sampler.epoch,
            "position": sampler.position,
            "order": self._order_record(sampler.epoch),
            "sampler": sampler.order(sampler.epoch).state,
            "num_bad_samples": 0 if self.bad_samples is None else self.bad_samples.total,
        }

    def _order_record(self, epoch: int) -> dict[str, Any]:
        order = self._sampler.order(epoch)
        return {"sampler": sampler_name(self._given_sampler), "length": order.length, "checksum": order.checksum}

    def rank_state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any] | None) -> None:
        if is_stateful(self._given_sampler) and state.get("sampler") is not None:
            self._given_sampler.load_state_dict(state["sampler"])  # type: ignore[attr-defined]
        if self.bad_samples is not None:
            self.bad_samples.total, self.bad_samples.new = state.get("num_bad_samples", 0), []
        self._sampler.go_to(state["seed"], state["epoch"], state["position"])
        saved, own = state.get("order"), self._order_record(state["epoch"])
        if saved is None:  # saved by trainloop 0.1.0, which counted the batches of a custom batch sampler
            self._sampler.position = self._sampler.num_samples(state["epoch"], state["position"])
        elif state["position"] and saved != own and {**saved, "checksum": 0} == {**own, "checksum": 0}:
            if isinstance(self._given_sampler, DatasetOrder):
                remedy = (
                    "Give it the data and the arguments of the saved run. To train on other data from here on, let the"
                    ' data begin anew: `CheckpointingHook(on_resume=["data"])`.'
                )
            else:
                remedy = (
                    "Let it draw from a generator that it holds as an attribute (`self.generator = torch.Generator()`),"
                    " which the trainer seeds for each epoch; or give it `set_epoch`; or `state_dict` and"
                    " `load_state_dict`."
                )
            raise ValueError(
                f"The {own['sampler']} of `build_data_loader` gives another order of epoch {state['epoch']} than the"
                f" saved run had, so samples of it would be seen twice and others never. {remedy}"
            )
