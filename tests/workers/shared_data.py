"""Trains on and evaluates data of which the ranks may not read the same, and writes what each rank saw or was told.

Usage: accelerate launch shared_data.py OUT
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset

from trainloop import BaseTrainer
from trainloop.data import per_rank

N, BATCH = 24, 4
"""`N` is a multiple of the global batch at 1, 2 and 3 ranks."""


class Numbers(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


class Flipped(Numbers):
    """Draws from a generator of its own, which differs between the ranks. Its samples cannot be compared."""

    rng = random.Random()

    def __getitem__(self, index: int) -> Any:
        return {"number": index, "noise": self.rng.random()}


class OfRank(DistributedSampler):  # type: ignore[type-arg]
    """A subclass, as scripts have them."""


class Strided(Sampler):  # type: ignore[type-arg]
    def __init__(self, rank: int, world_size: int) -> None:
        self.numbers = range(rank, N, world_size)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


class OwnBatches(BatchSampler):
    pass


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rank: int = 0, world_size: int = 1, shuffles: bool = False) -> None:
        self.numbers, self.shuffles = range(rank, N, world_size), shuffles

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(self.numbers, len(self.numbers)) if self.shuffles else self.numbers)


class Sharded(Stream):
    """Gives each rank its share, by the protocol."""

    def shard(self, rank: int, world_size: int) -> Stream:
        return Stream(rank, world_size)


class Files(IterableDataset):  # type: ignore[type-arg]
    """Becomes its share, and shuffles its files anew in each epoch. Counts what it reads."""

    reads = 0

    def __init__(self, sizes: list[int], is_strict: bool = False) -> None:
        self.files = [list(part) for part in torch.arange(sum(sizes)).split(sizes)]
        self.place, self.epoch, self.is_strict = slice(None), 0, is_strict

    def shard(self, rank: int, world_size: int) -> None:
        if self.is_strict and len(self.files) % world_size:
            raise ValueError("uneven")
        self.place = slice(rank, None, world_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        files = random.Random(self.epoch).sample(self.files, len(self.files)) if self.epoch else self.files
        for file in files[self.place]:
            for number in file:
                Files.reads += 1
                yield number


class OwnList(Files):
    """Takes the files of the other ranks out of its list, which a shallow copy shares."""

    def shard(self, rank: int, world_size: int) -> None:
        self.files[:] = self.files[rank::world_size]


class Batches:
    """A bare iterable."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.batches = torch.arange(N).split(BATCH)[rank::world_size]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def table(num_shards: int, *rank: int) -> Any:
    """A stream of Hugging Face, split for a rank or not."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    numbers = datasets.Dataset.from_dict({"number": list(range(N))}).to_iterable_dataset(num_shards=num_shards)
    return split_dataset_by_node(numbers, *rank) if rank else numbers


def make_loaders(rank: int, world_size: int) -> dict[str, tuple[Any, bool]]:
    """Loaders by name, and whether each shards itself."""
    numbers = Numbers()
    distributed = DistributedSampler(numbers, world_size, rank)
    return {
        "subclass": (DataLoader(numbers, BATCH, sampler=OfRank(numbers, world_size, rank)), True),
        "strided": (DataLoader(numbers, BATCH, sampler=Strided(rank, world_size)), True),
        "batch_sampler": (DataLoader(numbers, batch_sampler=OwnBatches(distributed, BATCH, False)), True),
        "subset": (DataLoader(Subset(numbers, range(rank, N, world_size)), BATCH), True),
        "subset_in_workers": (DataLoader(Subset(numbers, range(rank, N, world_size)), BATCH, num_workers=2), True),
        "stream": (DataLoader(Stream(rank, world_size), BATCH), True),
        "stream_in_workers": (DataLoader(Stream(rank, world_size), BATCH, num_workers=1), True),
        "bare_iterable": (Batches(rank, world_size), True),
        "split_by_node": (DataLoader(table(6, rank, world_size), BATCH), True),
        "list": (list(torch.arange(N).split(BATCH))[rank::world_size], True),
        "plain": (DataLoader(numbers, BATCH, shuffle=True), False),
        "own_noise": (DataLoader(Flipped(), BATCH, shuffle=True), False),
        "shuffled_stream": (DataLoader(Stream(shuffles=True), BATCH), False),
        "same_bare_iterable": (Batches(), False),
        "sharded": (DataLoader(Sharded(), BATCH), False),
        "shared_by_files": (DataLoader(table(6), BATCH), False),
        "too_few_files": (DataLoader(table(5), BATCH), False),
    }


class MeanNumber:
    """A metric that is called, as torchmetrics allows it, and cannot compute a value of nothing."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total = self.count = 0

    def update(self, numbers: torch.Tensor) -> None:
        self.total, self.count = self.total + int(numbers.sum()), self.count + len(numbers)

    def compute(self) -> float:
        return self.total / self.count

    def __call__(self, numbers: torch.Tensor) -> float:
        """The value of this batch alone."""
        total, count = self.total, self.count
        self.reset()
        self.update(numbers)
        value = self.compute()
        self.total, self.count = self.total + total, self.count + count
        return value


class Trainer(BaseTrainer):
    loader: Any = None

    def build_data_loader(self) -> Any:
        self.seen: list[int] = []
        return self.loader

    def build_model(self) -> nn.Module:
        self.metric = MeanNumber()
        return nn.Linear(1, 1)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1e-4)

    def forward(self, batch: Any) -> Any:
        numbers = batch["number"] if isinstance(batch, dict) else batch
        self.seen += numbers.tolist()
        return self.model(numbers[:, None].float()).mean(), {}

    def predict_forward(self, batch: Any) -> Any:
        return batch

    def eval_forward(self, batch: Any) -> Any:
        numbers = batch["number"] if isinstance(batch, dict) else batch
        mean = self.metric(numbers)
        return self.model(numbers[:, None].float()).mean(), {
            "metric": self.metric,
            "count": len(numbers),
            "sum": numbers.sum(),
            "mean": mean,
        }


def evaluated_shares(trainer: Trainer) -> dict[str, Any]:
    """By case: what an evaluation finds, and how much of it this rank reads."""
    found: dict[str, Any] = {}
    used, strict = DataLoader(Files([4] * 6), BATCH), DataLoader(Files([4] * 7, is_strict=True), BATCH)
    uneven, own_list = (DataLoader(kind([7, 1, 9, 3, 5]), BATCH) for kind in (Files, OwnList))
    for name, loader in {
        "used": used,
        "uneven": uneven,
        "again": uneven,
        "own_list": own_list,
        "own_list_again": own_list,
        "one_file": DataLoader(Files([10]), BATCH),
        "strict": strict,
        "in_workers": DataLoader(Files([4] * 6), BATCH, num_workers=1),
        "drop_last": DataLoader(Files([7, 1, 9, 3, 5]), BATCH, drop_last=True),
        "hugging_face": DataLoader(table(6).map(counted), BATCH),
    }.items():
        if name == "used":  # in training too, in another epoch
            training = Trainer(N // BATCH // trainer.accelerator.num_processes, seed=1)
            training.loader = loader
            training.train()
            loader.dataset.set_epoch(7 + trainer.accelerator.process_index)
        Files.reads = 0
        evaluated = told(partial(trainer.evaluate, loader, reduce={"count": "sum", "sum": "sum"}))
        found[name] = [evaluated["count"], evaluated["sum"], Files.reads] if isinstance(evaluated, dict) else evaluated
    assert used.dataset.epoch == 7 + trainer.accelerator.process_index  # type: ignore[attr-defined]
    found["predicted"] = told(lambda: trainer.predict(uneven).tolist())
    found["unseeded"] = told(partial(trainer.evaluate, DataLoader(table(6).shuffle(), BATCH)))
    return found


def counted(sample: dict[str, int]) -> dict[str, int]:
    Files.reads += 1
    return sample


class Counting(Trainer):
    """Without the metric, which a rank without a batch could not compute."""

    def eval_forward(self, batch: Any) -> Any:
        numbers = batch["number"] if isinstance(batch, dict) else batch
        return self.model(numbers[:, None].float()).mean(), {"count": len(numbers), "sum": numbers.sum()}


def told(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as ex:
        return f"{type(ex).__name__}: {ex}"


def main() -> None:
    out = Path(sys.argv[1])
    results: dict[str, Any] = {}
    first = Trainer(1, seed=1)
    first.loader = [torch.arange(4)]
    rank, world_size = first.accelerator.process_index, first.accelerator.num_processes
    for name, (loader, _) in make_loaders(rank, world_size).items():
        for suffix, data in (("", loader), (".per_rank", per_rank(loader))):
            trainer = Trainer(N // BATCH // world_size, seed=1)
            trainer.loader = data
            error = told(trainer.train)
            evaluated = told(partial(first.evaluate, data, reduce={"count": "sum", "sum": "sum"}))
            results[name + suffix] = {"seen": trainer.seen, "error": error, "evaluated": evaluated}
    unseeded = Trainer(1, seed=1)
    unseeded.loader = DataLoader(table(6).shuffle(), BATCH)
    results["unseeded"] = told(unseeded.train)
    # 5 batches: at 2 and 3 ranks the last round has batches that do not count.
    results["padded"] = told(lambda: first.evaluate(list(torch.arange(20).split(4)), reduce={"count": "sum"}))
    uneven = per_rank([torch.arange(4)] * (rank + 1))
    results["uneven"] = told(lambda: first.evaluate(uneven, reduce={"count": "sum"}))
    empty = per_rank([torch.arange(4)] * (1 - rank))
    counting = Counting(1, seed=1)
    counting.loader = first.loader
    results["empty"] = told(lambda: counting.evaluate(empty, reduce={"count": "sum"}))
    results["shares"] = evaluated_shares(counting)
    (out / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
