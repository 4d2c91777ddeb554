"""Repeats the first batches of the data, to see whether a model can learn them by heart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ..records import map_nested_tensor
from .loaders import is_map_style
from .per_rank import PerRank


class KeptBatches(Sequence[Any]):
    """Batches in memory. Each access gives new tensors, because `forward` may change them in place.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return map_nested_tensor(lambda tensor: tensor.clone(), self._batches[index])


def keep_first_batches(loader: Any, num_batches: int, has_seed: bool) -> Any:
    """Keep the first batches in memory, if the data has no index. Data with an index is returned unchanged, because
    the feed repeats the beginning of its first epoch.

    Args:
        loader: The result of `build_data_loader`.
        num_batches: Number of batches, as one process draws them. With `per_rank`: for each rank.
        has_seed: Whether the script has set a seed.

    Raises:
        ValueError: There is no seed, so a resumed run would keep other batches.
    """
    if is_map_style(loader) or (isinstance(loader, Sequence) and not isinstance(loader, str | bytes)):
        return loader
    if not isinstance(loader, Iterable):
        return loader  # refused later, with a better message
    if not has_seed:
        raise ValueError(
            "`overfit_batches` needs a `seed` if the data has no index, so that a resumed run draws the same batches."
            " Pass one to the trainer."
        )
    kept = KeptBatches(itertools.islice(loader.loader if isinstance(loader, PerRank) else loader, num_batches))
    return PerRank(kept) if isinstance(loader, PerRank) else kept
