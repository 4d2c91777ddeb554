"""Rebuilds a user's `DataLoader` with one of our samplers.

All other settings stay: collate function, workers, pinning, timeout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch.utils.data import DataLoader, IterableDataset

from .sampling import SeededDataset, is_of_torchdata
from .workers import WithOwnDataset


def is_map_style(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether `loader` is a `DataLoader` of a map-style data set that yields the same as torch's own class."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return iterates_as_torchs(loader)


def iterates_as_torchs(loader: DataLoader[Any]) -> bool:
    """Whether `loader` yields the same as torch's own class."""
    return type(loader).__iter__ is DataLoader.__iter__ or is_of_torchdata(loader)


def with_sampler(loader: DataLoader[Any], sampler: Iterable[Any], seed: int) -> DataLoader[Any]:
    """Give a loader of a map-style data set another sampler. Like the old one, it yields either batches or items.

    The loader also gets its own generator. Otherwise each new iterator would draw from the process's generator, and a
    resumed run makes one more iterator. With workers, the sampler must yield keys of `SeededDataset`.
    """
    if loader.batch_sampler is None:
        sampling: dict[str, Any] = {"batch_size": None, "sampler": sampler}
    else:
        sampling = {"batch_sampler": sampler}
    return DataLoader(
        loader.dataset if loader.num_workers == 0 else SeededDataset(loader.dataset),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=WithOwnDataset(loader.worker_init_fn) if loader.num_workers else None,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=loader.prefetch_factor,
        **sampling,
    )
