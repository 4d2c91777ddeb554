"""Streams as people bring them: sharded by our protocol, resumed by a state, of Hugging Face, as bare iterables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

N, BATCH = 30, 4
reads: list[int] = []
"""Samples that were read in this process, in their order."""


class Sharded(IterableDataset):  # type: ignore[type-arg]
    """Reads its share only, and splits it over the workers."""

    share = range(N)

    def shard(self, rank: int, world_size: int) -> None:
        self.share = range(rank, N, world_size)

    def numbers(self) -> range:
        info = get_worker_info()
        return self.share if info is None else self.share[info.id :: info.num_workers]

    def __iter__(self) -> Iterator[int]:
        for number in self.numbers():
            reads.append(number)
            yield number


class ShardedWithState(Sharded):
    """Returns its share as another object, and knows its position."""

    position = 0

    def shard(self, rank: int, world_size: int) -> ShardedWithState:  # type: ignore[override]
        share = ShardedWithState()
        share.share = range(rank, N, world_size)
        return share

    def __iter__(self) -> Iterator[int]:
        numbers = self.numbers()
        while self.position < len(numbers):
            self.position += 1
            reads.append(numbers[self.position - 1])
            yield numbers[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])


class Walk:
    """An iterator that knows its position, and draws noise on its way."""

    def __init__(self, numbers: range) -> None:
        self.numbers, self.position = numbers, 0

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> torch.Tensor:
        if self.position >= len(self.numbers):
            raise StopIteration
        self.position += 1
        reads.append(self.numbers[self.position - 1])
        return torch.stack([torch.tensor(float(self.numbers[self.position - 1])), torch.rand(())])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class WithStatefulIterator(Sharded):
    """Every rank reads everything; the iterator has the state, as torchdata allows it."""

    shard = None  # type: ignore[assignment]

    def __iter__(self) -> Walk:  # type: ignore[override]
        return Walk(self.numbers())


class Batches:
    """A bare iterable of batches."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(N).split(3)


def stateful_loader(dataset: Any, num_workers: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, BATCH, num_workers=num_workers)


def add_noise(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """A transform of rows."""
    return {**rows, "noise": [float(torch.rand(())) for _ in rows["number"]]}


@functools.cache
def hugging_face_table() -> Any:
    import datasets

    rows = {"number": list(range(N)), "text": [f"text {i}" for i in range(N)]}
    return datasets.Dataset.from_dict(rows)


def hugging_face(change: Callable[[Any], Any], **options: Any) -> Callable[[int, int, int], DataLoader[Any]]:
    """A loader of Hugging Face's data, map-style or a stream."""
    return lambda rank, world_size, num_workers: DataLoader(
        change(hugging_face_table()), batch_size=BATCH, num_workers=num_workers, **options
    )


def numbers_of(batch: Any) -> list[int]:
    """The numbers of the samples. The other values of a batch belong to them."""
    if isinstance(batch, dict):
        assert batch["text"] == [f"text {i}" for i in batch["number"]]
        batch = batch["number"]
    return [int(number) for number in (batch[:, 0] if batch.ndim == 2 else batch)]
