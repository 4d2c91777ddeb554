"""Several data sets as one, each with its share of the samples.

The source of sample n depends only on the seed and n. The same is true for the passes through each source:

```
sample of the mixture   0   1   2   3   4   5   …    positions continue from epoch to epoch
source                  a   b   a   a   b   a   …    shares follow `weights`, also in each short stretch
sample of the source    a0  b0  a1  a2  b1  a3  …    a permutation of a, then another one of it
```
"""

from __future__ import annotations

import itertools
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.data import IterableDataset

from ..errors import TrainloopWarning, check_int, describe
from ..rng import derived_seed
from .bad_samples import SkipBadSamples
from .order import EpochOrdered, permutation

Weights: TypeAlias = Mapping[str, float]
_GOLDEN = 2654435769  # 2^32 divided by the golden ratio: its multiples are spread evenly in [0, 2^32)
_CHUNK = 1 << 16  # samples whose sources are computed at a time
_BLOCK = 1 << 20  # samples that are counted at a time


class Mixture(EpochOrdered):
    """Several map-style data sets as one, each with its share of the samples, for `build_data_loader`.

    Each source is read completely before one of its samples is repeated, also across epochs. With
    `DataLoader(..., shuffle=True)`, each pass through a source is another permutation of it. The shares hold in each
    stretch of the order, so nearly in each batch. The order depends only on the seed, so a run resumes exactly, at any
    number of processes and workers. `data/share/<name>` in the records of `LoggingHook` is the share of each source
    among the samples that all ranks have seen since the run began.

    Outside the trainer, sample `i` is the i-th of the mixture without shuffling.

    Args:
        datasets: The sources by name: map-style data sets.
        weights: The share of each source by name, in any unit. To change the shares during the run: a list of pairs
            (step, weights), each valid from its step on, or a function from the step to the weights, which must depend
            only on the step. Steps count from 1, as in `trainer.step`.
        num_samples: Samples in an epoch. None: the total of all sources.
        samples_per_step: Samples in an optimizer step, over all processes. Needed if the weights depend on the step:
            sample n belongs to step `n // samples_per_step + 1`. So the order stays the same if a run resumes with
            another global batch. A discarded window counts as a step.

    Raises:
        TypeError: A source has no `__getitem__`, or is a `SkipBadSamples`, which must wrap the mixture instead.
        ValueError: A source is empty, or the names in `weights` differ from the sources.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        weights: Weights | Sequence[tuple[int, Weights]] | Callable[[int], Weights],
        *,
        num_samples: int | None = None,
        samples_per_step: int | None = None,
    ) -> None:
        if not isinstance(datasets, Mapping) or not datasets:
            raise TypeError(f"`datasets` must map names to data sets, but is {describe(datasets)}.")
        check_int("num_samples", num_samples, 1, optional=True)
        check_int("samples_per_step", samples_per_step, 1, optional=True)
        for name, dataset in datasets.items():
            _check_source(name, dataset)
        self._names, self._datasets = list(datasets), list(datasets.values())
        self._num_samples = num_samples or sum(map(len, self._datasets))
        self._weights = weights if callable(weights) or isinstance(weights, Mapping) else list(weights)
        self._constant = self._limits(weights) if isinstance(weights, Mapping) else None
        self.samples_per_step = samples_per_step if self._constant is None else None
        if self._constant is None and samples_per_step is None:
            raise ValueError("`weights` depend on the step, so `samples_per_step` must say how many samples make one.")
        steps = [step for step, _ in self._weights] if isinstance(self._weights, list) else [1]
        if not steps or steps[0] not in (0, 1) or steps != sorted(set(steps)):
            raise ValueError(f"The steps of `weights` must begin at 1 and rise, but are {steps}.")
        for step in steps:
            self._limits(self._weights_at(step))
        self._before_epoch, self._seen = _Count(self), _Count(self)
        self._in_order: torch.Tensor | None = None

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return self._num_samples

    def __getitem__(self, index: int) -> Any:
        """A sample. An index of `len` or more, as `epoch_indices` returns them, names a sample of a source."""
        if index < 0:
            index += len(self)
        if index < 0:
            raise IndexError(f"The mixture has {len(self)} samples, but the index is {index - len(self)}.")
        if index < len(self):
            if self._in_order is None:
                self._in_order = self.epoch_indices(0, 0, shuffle=False)
            index = int(self._in_order[index])
        source, index = self._split(index)
        return self._datasets[source][index]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def epoch_indices(self, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
        start = epoch * len(self)
        sources = self._sources(seed, start, start + len(self))
        indices = torch.empty(len(self), dtype=torch.int64)
        for i, num_before in enumerate(self._before_epoch.at(seed, start)):
            places = (sources == i).nonzero().flatten()
            own = self._read_on(i, seed, num_before, len(places), shuffle)
            indices[places] = own.mul_(len(self._names)).add_(i + len(self))
        return indices

    def name_of(self, index: int) -> str:
        source, index = self._split(index)
        dataset = self._datasets[source]
        return f"{dataset.name_of(index) if isinstance(dataset, EpochOrdered) else index} of {self._names[source]!r}"

    def shares(self, seed: int, epoch: int, position: int) -> dict[str, float]:
        """The share of each source among the samples before a position of the order.

        Args:
            seed: Seed of the run.
            epoch: The epoch, from 0.
            position: Number of samples of the epoch that have been seen.
        """
        counts = self._seen.at(seed, epoch * len(self) + position)
        return {name: count / max(1, sum(counts)) for name, count in zip(self._names, counts, strict=True)}

    def _sources(self, seed: int, start: int, stop: int) -> torch.Tensor:
        """The source of each sample from `start` to `stop`, counted over all epochs: int16."""
        offset = derived_seed(seed, "mixture")
        found = torch.empty(stop - start, dtype=torch.int16)
        for places in torch.arange(start, stop).split(_CHUNK):  # type: ignore[no-untyped-call]
            points = (places * _GOLDEN + offset) & 0xFFFFFFFF
            sources = (points[:, None] >= self._limits_at(places)).sum(1, dtype=torch.int16)
            found[int(places[0]) - start : int(places[-1]) + 1 - start] = sources
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_in_order": None}

    def _split(self, index: int) -> tuple[int, int]:
        """The source, and the index in it."""
        index, source = divmod(index - len(self), len(self._names))
        return source, index

    def _read_on(self, source: int, seed: int, num_before: int, count: int, shuffle: bool) -> torch.Tensor:
        """The next `count` indices of a source, after the first `num_before`."""
        name, dataset = self._names[source], self._datasets[source]
        pieces = [torch.empty(0, dtype=torch.int64)]
        while count:
            number, start = divmod(num_before, len(dataset))
            if isinstance(dataset, EpochOrdered):
                order = dataset.epoch_indices(derived_seed(seed, name), number, shuffle)
            else:
                order = permutation(len(dataset), seed, name, number) if shuffle else torch.arange(len(dataset))
            pieces.append(order[start : start + count])
            num_before, count = num_before + len(pieces[-1]), count - len(pieces[-1])
        return torch.cat(pieces)

    def _limits_at(self, places: torch.Tensor) -> torch.Tensor:
        """The limits of the sources at samples of the mixture: 1 or N x number of sources - 1."""
        if self._constant is not None or self.samples_per_step is None:
            assert self._constant is not None
            return self._constant[None]
        steps = places.div(self.samples_per_step, rounding_mode="floor").add_(1)
        first, last = int(steps[0]), int(steps[-1])
        rows = torch.stack([self._limits(self._weights_at(step)) for step in range(first, last + 1)])
        return rows[steps - first]

    def _weights_at(self, step: int) -> Any:
        weights = self._weights
        if isinstance(weights, list):
            return weights[bisect_right(weights, step, key=lambda pair: pair[0]) - 1][1]
        return weights(step) if callable(weights) else weights

    def _limits(self, weights: Any) -> torch.Tensor:
        """The borders between the parts of the sources in [0, 2^32]: number of sources - 1."""
        if not isinstance(weights, Mapping) or set(weights) != set(self._names):
            raise ValueError(
                f"`weights` must be given for each source, {', '.join(map(repr, self._names))}, but are"
                f" {describe(weights)}."
            )
        values = [weights[name] for name in self._names]
        if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in values) or not sum(values):
            raise ValueError(f"`weights` must be numbers from 0 on, and one above 0, but are {dict(weights)}.")
        *sums, total = itertools.accumulate(values)
        return torch.tensor([round(part / total * 2**32) for part in sums], dtype=torch.int64)


class _Count:
    """Counts the samples of each source before a place in the order. It continues from its last place."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._seed, self._place, self._counts = 0, 0, torch.zeros(0, dtype=torch.int64)

    def at(self, seed: int, place: int) -> list[int]:
        num_sources = len(self._mixture._names)
        if seed != self._seed or place < self._place or not len(self._counts):
            self._seed, self._place, self._counts = seed, 0, torch.zeros(num_sources, dtype=torch.int64)
        for start in range(self._place, place, _BLOCK):
            sources = self._mixture._sources(seed, start, min(start + _BLOCK, place))
            self._counts = self._counts + torch.bincount(sources, minlength=num_sources)
        self._place = place
        counts: list[int] = self._counts.tolist()
        return counts


def check_samples_per_step(loader: Any, num_batches: int) -> None:
    """Warn if the loader has a mixture whose weights depend on the step, and whose `samples_per_step` is not the run's.

    Args:
        loader: The return value of `build_data_loader`.
        num_batches: Number of batches in an optimizer step, over all processes.
    """
    dataset, batch_size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    if isinstance(dataset, SkipBadSamples):
        dataset = dataset.dataset
    num_samples = num_batches * batch_size if batch_size is not None else None
    if num_samples is not None and isinstance(dataset, Mixture) and dataset.samples_per_step not in (None, num_samples):
        warnings.warn(
            "The weights of the Mixture depend on the step. `samples_per_step` says that a step has"
            f" {dataset.samples_per_step} samples, but a step of this run has {num_samples}. The weights follow"
            " `samples_per_step`.",
            TrainloopWarning,
            stacklevel=2,
        )


def _check_source(name: Any, dataset: Any) -> None:
    if isinstance(dataset, SkipBadSamples):
        raise TypeError(
            f"The source {name!r} is a SkipBadSamples. Put it around the mixture: `SkipBadSamples(Mixture(...), ...)`."
        )
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"The source {name!r} must be a map-style data set, with `__getitem__` and `__len__`, but is"
            f" {describe(dataset)}."
        )
    if not len(dataset):
        raise ValueError(f"The source {name!r} is empty.")
