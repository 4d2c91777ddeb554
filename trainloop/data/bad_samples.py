"""Samples that cannot be read: each is replaced by the next sample of the order, and the run counts them.

```
sampler: index, and the next 8 ─► worker: reads ─► batch, and the samples that failed ─► rank: logs, counts
```

Only samples of consumed batches are counted. The ranks exchange the counts only after a failure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import Dataset, IterableDataset

from ..errors import TrainingError, check_int, describe
from ..ranks import collectives
from .order import EpochOrdered

NUM_SUBSTITUTES = 8
_MAX_LENGTH = 300  # characters of an error's text


class BadSample(NamedTuple):
    """A sample that could not be read."""

    name: str
    substitute: str
    """The name of the sample that was read instead."""
    error: str


class Candidates(NamedTuple):
    """The key that `SkipBadSamples` gets: an index, and the indices to try instead, one after another."""

    first: Any
    substitutes: tuple[Any, ...]


class Fetched(NamedTuple):
    """A batch, and the samples that could not be read for it."""

    batch: Any
    bad_samples: list[BadSample]


class SkipBadSamples(Dataset[Any]):
    """A map-style data set for training that skips a sample if reading it raises.

    The sample is replaced by the next one in the epoch's order, or by one of the seven after that. So the replacement
    is the same after a resume, at any number of processes and workers. The log names each skipped sample with its
    error. `data/bad_samples` in the records of `LoggingHook` counts them, over all ranks and since the run began.
    Checkpoints save the count.

    It must be the data set of the `DataLoader` that `build_data_loader` returns, and the outermost wrapper. Anywhere
    else, including evaluations, a bad sample raises its error: an evaluation must count every sample.

    Args:
        dataset: A data set with `__getitem__` and `__len__`. It is read sample by sample.
        max_failures: If a run has skipped more samples than this, it ends with a `trainloop.TrainingError`. A bad
            sample counts once in each epoch.

    Raises:
        TypeError: `dataset` has no `__getitem__`, or is an `IterableDataset`.
    """

    def __init__(self, dataset: Any, max_failures: int) -> None:
        check_int("max_failures", max_failures, 0)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"`dataset` must have `__getitem__` and `__len__`, but is {describe(dataset)}.")
        self.dataset, self.max_failures = dataset, max_failures
        self._bad_samples: list[BadSample] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """A sample."""
        if not isinstance(index, Candidates):
            return self.dataset[index]
        first_error: Exception | None = None
        for candidate in (index.first, *index.substitutes):
            try:
                sample = self.dataset[candidate]
            except Exception as ex:
                first_error = first_error or ex
                continue
            if first_error is not None:
                names = self._name_of(index.first), self._name_of(candidate)
                self._bad_samples.append(BadSample(*names, _text(first_error)))
            return sample
        assert first_error is not None
        raise TrainingError(
            f"Sample {self._name_of(index.first)} could not be read ({_text(first_error)}), nor could the"
            f" {len(index.substitutes)} after it in the order. Check whether the storage is there."
        ) from first_error

    def take_bad_samples(self) -> list[BadSample]:
        """The bad samples since the last call, in this process."""
        taken, self._bad_samples = self._bad_samples, []
        return taken

    def _name_of(self, index: Any) -> str:
        return self.dataset.name_of(index) if isinstance(self.dataset, EpochOrdered) else str(index)


@dataclass
class CollateWithBadSamples:
    """A `collate_fn` that adds the samples that could not be read to the batch."""

    collate_fn: Callable[[Any], Any]
    dataset: SkipBadSamples

    def __call__(self, samples: Any) -> Fetched:
        return Fetched(self.collate_fn(samples), self.dataset.take_bad_samples())


class BadSampleCount:
    """Counts the samples that a run could not read, over all ranks together."""

    def __init__(self, max_failures: int) -> None:
        self.total = 0
        self.new: list[BadSample] = []
        """This rank's bad samples that the other ranks don't know yet."""
        self._max_failures = max_failures

    def exchange(self, logger: logging.Logger, step: int) -> None:
        """Log and count the bad samples of all ranks. Call on every rank, after one of them has found any.

        Raises:
            TrainingError: On every rank. There are too many bad samples.
        """
        by_rank: Sequence[list[BadSample]] = collectives.gather_objects(self.new)
        self.new = []
        for rank, bad_samples in enumerate(by_rank):
            for name, substitute, error in bad_samples:
                self.total += 1
                logger.warning(
                    f"Step {step}: sample {name} could not be read on rank {rank}, so sample {substitute} is used"
                    f" instead: {error}. Failed samples so far: {self.total} of at most {self._max_failures}."
                )
        if self.total > self._max_failures:
            last = next(bad_samples[-1] for bad_samples in reversed(by_rank) if bad_samples)
            raise TrainingError(
                f"Step {step}: {self.total} samples could not be read, more than the {self._max_failures} that"
                f" `SkipBadSamples(max_failures=…)` allows. The last is {last.name}: {last.error}. The log names them"
                " all."
            )


def _text(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 3] + "..."
