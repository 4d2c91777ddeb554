"""The share of a stream that a rank reads in an evaluation, if the data set can provide shares."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..data.loaders import iterates_as_torchs
from ..data.shares import has_protocol, is_of_hugging_face, share_of

_templates: dict[int, tuple[weakref.ref[Any], Any]] = {}
"""By the id of a data set: a weak reference to it, and the copy that is asked for shares. It may become a share."""


def share_loader(data: Any, rank: int, world_size: int) -> Any | None:
    """An iterable of this rank's batches. `data` itself is not changed.

    Args:
        data: The evaluation data: a loader of a stream, or another iterable of batches.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        The iterable. None: there are no shares, or the loader has `drop_last`, which would drop a tail of each share.
    """
    if not isinstance(data, DataLoader):
        return _share(data, rank, world_size)
    if not isinstance(data.dataset, IterableDataset) or not iterates_as_torchs(data) or data.drop_last:
        return None
    dataset = _share(data.dataset, rank, world_size)
    if dataset is None:
        return None
    return DataLoader(
        dataset,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        generator=data.generator,
        prefetch_factor=data.prefetch_factor,
    )


def _share(dataset: Any, rank: int, world_size: int) -> Any | None:
    """A new data set with this rank's share, at its beginning. None: there are no shares."""
    if is_of_hugging_face(dataset):
        share = share_of(dataset, rank, world_size)
        return share.dataset if share.is_own else None
    if not has_protocol(dataset):
        return None
    try:
        # On a copy: `shard` may change its data set, which `train` or `predict` may use too.
        share = share_of(_template(dataset), rank, world_size)
    except ValueError:  # for example because the shares have unequal sizes, which matters only in training
        return None
    if not share.is_own:
        return None
    own = copy.copy(share.dataset)
    if hasattr(own, "set_epoch"):
        own.set_epoch(0)  # the same order on every rank, at every evaluation
    return own


def _template(dataset: Any) -> Any:
    key = id(dataset)
    if key not in _templates:
        reference = weakref.ref(dataset, lambda _: _templates.pop(key, None))
        _templates[key] = reference, copy.copy(dataset)
    return _templates[key][1]
