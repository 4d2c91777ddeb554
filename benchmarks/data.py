"""What a batch and an order of ten million samples cost, beside torch's loaders: `python -m benchmarks.data`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainloop.data import Mixture
from trainloop.data.feed import DataFeed

from .environment import environment
from .harness import REPOSITORY, quartiles, ratios
from .report import machine, table

BEGIN, END = "<!-- data results -->", "<!-- end of data results -->"
NUM_SAMPLES = 10_000_000
BATCH = 32
PLAIN, STATEFUL, OURS = "DataLoader", "StatefulDataLoader", "trainloop"


class Numbers(Dataset[int]):
    """As many samples as there are orders for; each costs nothing."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def feed(loader: DataLoader[Any]) -> DataFeed:
    return DataFeed(loader, seed=0, rank=0, world_size=1, device=torch.device("cpu"))


def stateful(dataset: Any, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, BATCH, shuffle=True, **options)


# ---------------------------------------------------------------------- a batch


def batches(num_workers: int, num_rounds: int, num_batches: int) -> dict[str, list[float]]:
    """Wall seconds a batch, round by round: the loaders take turns at drawing `num_batches`."""
    dataset = TensorDataset(torch.randn(num_batches * BATCH * (num_rounds + 2), 16))
    ours = feed(DataLoader(dataset, BATCH, shuffle=True, num_workers=num_workers))
    ours.start()
    iterators: dict[str, Iterator[Any]] = {
        PLAIN: iter(DataLoader(dataset, BATCH, shuffle=True, num_workers=num_workers)),
        STATEFUL: iter(stateful(dataset, num_workers=num_workers)),
        OURS: iter(ours.__next__, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in iterators}
    for i in range(num_rounds + 1):
        for name, iterator in iterators.items():
            start = time.perf_counter()
            for _ in islice(iterator, num_batches):
                pass
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / num_batches)
    ours.close()
    return seconds


# ---------------------------------------------------------------------- an order


def first_batch(loader: DataLoader[Any]) -> None:
    next(iter(loader))


def first_of_feed(loader: DataLoader[Any], position: int = 0) -> None:
    with feed(loader) as data:
        if position:
            data.load_state_dict({**data.state_dict(), "position": position, "order": {}}, None)
        data.start()
        next(data)


def state_in_the_middle() -> Any:
    """Of a `StatefulDataLoader` that has really drawn half of the epoch."""
    loader = stateful(Numbers(NUM_SAMPLES))
    for _ in islice(loader, NUM_SAMPLES // 2 // BATCH):
        pass
    return loader.state_dict()


def resume_stateful(state: Any) -> None:
    loader = stateful(Numbers(NUM_SAMPLES))
    loader.load_state_dict(state)
    next(iter(loader))


def mixture() -> Mixture:
    sizes = {"a": NUM_SAMPLES * 6 // 10, "b": NUM_SAMPLES * 4 // 10}
    return Mixture({name: Numbers(size) for name, size in sizes.items()}, {"a": 0.7, "b": 0.3})


FIRST, RESUME = "first batch", "resume in the middle"
ORDERS: dict[tuple[str, str], Callable[[Any], None]] = {
    (FIRST, PLAIN): lambda _: first_batch(DataLoader(Numbers(NUM_SAMPLES), BATCH, shuffle=True)),
    (FIRST, STATEFUL): lambda _: first_batch(stateful(Numbers(NUM_SAMPLES))),
    (FIRST, OURS): lambda _: first_of_feed(DataLoader(Numbers(NUM_SAMPLES), BATCH, shuffle=True)),
    (FIRST, f"{OURS}, Mixture of two"): lambda _: first_of_feed(DataLoader(mixture(), BATCH, shuffle=True)),
    (RESUME, STATEFUL): resume_stateful,
    (RESUME, OURS): lambda _: first_of_feed(
        DataLoader(Numbers(NUM_SAMPLES), BATCH, shuffle=True), NUM_SAMPLES // 2 // BATCH * BATCH
    ),
}


def measure_order(what: str, name: str) -> None:
    """Print wall seconds, and by how many bytes the memory of this process has grown at most."""
    state = None
    if (what, name) == (RESUME, STATEFUL):
        with multiprocessing.get_context("fork").Pool(1) as pool:  # whose memory is not counted
            state = pool.apply(state_in_the_middle)
    before = memory("VmRSS")
    start = time.perf_counter()
    ORDERS[what, name](state)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, memory("VmHWM") - before]))


def memory(field: str) -> int:
    """Bytes, as Linux counts them for this process."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def orders(num_rounds: int) -> dict[tuple[str, str], list[tuple[float, int]]]:
    """Seconds and bytes, round by round, each in a fresh process."""
    measured: dict[tuple[str, str], list[tuple[float, int]]] = {key: [] for key in ORDERS}
    for _ in range(num_rounds):
        for key, values in measured.items():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data", "--order", *key]
            result = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY
            )
            seconds, num_bytes = json.loads(result.stdout.splitlines()[-1])
            values.append((seconds, num_bytes))
    return measured


# ---------------------------------------------------------------------- the report


def batch_table(by_workers: dict[int, dict[str, list[float]]]) -> str:
    lines = []
    for num_workers, seconds in by_workers.items():
        cells = [f"{quartiles(seconds[PLAIN])[1] * 1e6:.0f} us"]
        for name in (STATEFUL, OURS):
            low, middle, high = quartiles(ratios(seconds[name], seconds[PLAIN]))
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        lines.append([str(num_workers), *cells])
    return table(["workers", PLAIN, STATEFUL, OURS], lines)


def order_table(measured: dict[tuple[str, str], list[tuple[float, int]]]) -> str:
    lines = []
    for (what, name), values in measured.items():
        seconds, num_bytes = quartiles([value[0] for value in values])[1], quartiles([value[1] for value in values])[1]
        lines.append([what, name, f"{seconds:.2f} s", f"{num_bytes / 1e6:.0f} MB", f"{num_bytes / NUM_SAMPLES:.0f}"])
    return table(["", "", "wall", "memory at its peak", "bytes a sample"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    parser.add_argument("--order", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.order is not None:
        measure_order(*args.order)
        return
    warnings.simplefilter("ignore")  # torchdata's of its own
    by_workers = {num_workers: batches(num_workers, args.rounds, 200) for num_workers in (0, 2)}
    parts = [
        machine(),
        f"Wall time of a batch of {BATCH} samples of a `TensorDataset`, as a ratio to torch's `DataLoader` in the same"
        " round: median (quartiles).",
        batch_table(by_workers),
        f"A shuffled data set of {NUM_SAMPLES:,} samples, in a new process each time: until the first batch is there,"
        " and until the first batch of a resume in the middle of the epoch. Median.",
        order_table(orders(max(1, args.rounds // 4))),
    ]
    text = "\n\n".join(parts)
    print(text)
    if args.write:
        readme = Path(__file__).with_name("README.md")
        before, rest = readme.read_text().split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
