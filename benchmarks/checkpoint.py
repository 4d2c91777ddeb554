"""What a checkpoint costs beside other ways to write the same bytes: part of `make bench-full`, or `--help`.

A trainer with a model and AdamW's state; each contender saves, and then loads, in turns, round after round, so that a
busy machine slows all of them alike. Printed is the wall time for which training is blocked (median over the rounds),
bytes per second, and the ratio to the contender that the goal names, in the same round, with its quartiles. Between any
two the disk is left to come to rest; files are in the page cache when they are read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook
from trainloop.checkpoint import CheckpointStore, Content


class Trainer(BaseTrainer):
    num_layers: int
    width: int
    is_async: bool

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, self.width)), batch_size=8)

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.num_layers)))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def build_hooks(self) -> list[BaseHook]:
        self.checkpointing = CheckpointingHook(10**9, async_save=self.is_async)
        return [self.checkpointing]

    def forward(self, batch: Any) -> Any:
        return self.model(batch[0]).square().mean(), {}


def trainer_of(folder: Path, num_layers: int, width: int, is_async: bool) -> Trainer:
    trainer = Trainer(1, workspace=folder, seed=0)
    trainer.num_layers, trainer.width, trainer.is_async = num_layers, width, is_async
    trainer.train()
    trainer.checkpointing.on_before_train(trainer)  # opens the folder again
    return trainer


def sync_files(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def nothing() -> None:
    """What comes after work that is whole when it returns."""


class Contenders:
    """Each way to save, and each way to load, on the tensors of one trainer."""

    def __init__(self, folder: Path, num_layers: int, width: int) -> None:
        self.folder = folder
        self.trainers = {
            is_async: trainer_of(folder / f"ours{is_async}", num_layers, width, is_async) for is_async in (False, True)
        }
        trainer = self.trainers[False]
        model, optimizer = trainer.unwrapped_model, trainer._raw_optimizer
        names = {param: name for name, param in model.named_parameters()}
        state = optimizer.state.items()
        self.files = {
            "model": {name: tensor.detach() for name, tensor in model.state_dict().items()},
            "optim": {f"{names[p]}/{k}": v for p, values in state for k, v in values.items()},
        }
        self.tensors = [tensor for file in self.files.values() for tensor in file.values()]
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors)
        self.buffers = [torch.empty_like(tensor) for tensor in self.tensors]
        self.raw = [memoryview(tensor.numpy().reshape(-1)).cast("B") for tensor in self.tensors]
        self.states = get_state_dict(model, optimizer)
        self.nested = {"model": self.states[0], "optim": self.states[1]}
        self.group = dist.new_group(backend="gloo")
        self.newest: dict[str, Path] = {}
        self._numbers = itertools.count()
        self._superseded: list[Path] = []

    def fresh(self, name: str) -> Path:
        """An empty folder to save into. The one before stays until `rest`, as with everybody who does not want to be
        without a checkpoint at any moment.
        """
        folder = self.folder / f"{name}{next(self._numbers)}"
        folder.mkdir()
        if name in self.newest:
            self._superseded.append(self.newest[name])
        self.newest[name] = folder
        return folder

    # -------------------------------------------------------------- save

    def memcpy(self) -> None:
        for buffer, tensor in zip(self.buffers, self.tensors, strict=True):
            buffer.copy_(tensor)

    def plain(self) -> None:
        with open(self.fresh("plain") / "bytes", "wb") as file:
            for part in self.raw:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

    def safetensors(self) -> None:
        folder = self.fresh("safetensors")
        for name, tensors in self.files.items():
            save_file(tensors, folder / f"{name}.safetensors")
        sync_files(folder)

    def torch_save(self, is_synced: bool) -> None:
        folder = self.fresh("torch")
        torch.save(self.nested, folder / "state.pt")
        if is_synced:
            sync_files(folder)

    def dcp_save(self) -> None:
        dcp.save(self.nested, checkpoint_id=self.fresh("dcp"))

    def dcp_async(self) -> None:
        self.future = dcp.async_save(self.nested, checkpoint_id=self.fresh("async"), process_group=self.group)

    def accelerate(self) -> None:
        self.trainers[False].accelerator.save_state(str(self.fresh("accelerate")))

    def ours(self, is_async: bool) -> None:
        trainer = self.trainers[is_async]
        trainer.step += 1
        trainer.checkpointing._save(trainer, is_final=False)

    def wait_for_ours(self) -> None:
        for trainer in self.trainers.values():
            store = trainer.checkpointing._store
            assert store is not None
            store.wait()

    def rest(self) -> None:
        """Until nobody writes anything any more, and what is superseded is gone."""
        self.wait_for_ours()
        for folder in self._superseded:
            shutil.rmtree(folder)
        self._superseded = []
        os.sync()

    def saves(self) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
        """Name, what blocks, and what comes after it before the checkpoint is whole."""
        yield "memcpy into reused buffers", self.memcpy, nothing
        yield "write + fsync", self.plain, nothing
        yield "safetensors + fsync", self.safetensors, nothing
        yield "torch.save", partial(self.torch_save, is_synced=False), nothing
        yield "torch.save + fsync", partial(self.torch_save, is_synced=True), nothing
        yield "DCP save", self.dcp_save, nothing
        yield "DCP async_save", self.dcp_async, lambda: self.future.result()
        yield "accelerator.save_state", self.accelerate, nothing
        yield "trainloop", lambda: self.ours(False), nothing
        yield "trainloop async", lambda: self.ours(True), self.wait_for_ours

    # -------------------------------------------------------------- load

    def load_safetensors(self) -> None:
        for name in self.files:
            loaded = load_file(self.newest["safetensors"] / f"{name}.safetensors")  # only mapped: the copy reads it
            for target, tensor in zip(self.targets[name], (loaded[key] for key in self.files[name]), strict=True):
                target.copy_(tensor)

    def load_ours(self) -> None:
        store = self.trainers[False].checkpointing._store
        assert store is not None
        checkpoint = store.resolve("latest", "full")
        assert checkpoint is not None
        for group in ("model", "optim"):
            checkpoint.read_into(group, dict(zip(self.files[group], self.targets[group], strict=True)))

    def loads(self) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
        accelerator = self.trainers[False].accelerator
        self.targets = {group: [torch.empty_like(t) for t in file.values()] for group, file in self.files.items()}
        yield "safetensors load", self.load_safetensors, nothing
        yield "torch.load", lambda: torch.load(self.newest["torch"] / "state.pt"), nothing
        yield "DCP load", lambda: dcp.load(self.nested, checkpoint_id=self.newest["dcp"]), nothing
        yield "accelerator.load_state", lambda: accelerator.load_state(str(self.newest["accelerate"])), nothing
        yield "trainloop, verified", self.load_ours, nothing


Timings = dict[str, list[tuple[float, float]]]


def measure(contenders: Callable[[], Any], rest: Callable[[], None], num_rounds: int) -> Timings:
    """Seconds for which training is blocked, and until the checkpoint is whole, by contender and round."""
    seconds: Timings = {}
    for _ in range(num_rounds + 1):
        for name, work, finish in contenders():
            rest()
            start = time.perf_counter()
            work()
            blocked = time.perf_counter() - start
            finish()
            seconds.setdefault(name, []).append((blocked, time.perf_counter() - start))
    return seconds


def table(seconds: Timings, num_bytes: int, bases: dict[str, str], is_load: bool) -> None:
    print(f"{'load' if is_load else 'save':<28}{'first':>9}{'blocked':>9}{'whole':>9}{'GB/s':>7}   ratio (quartiles)")
    for name, rounds in seconds.items():
        steady = rounds[1:]
        blocked, whole = (statistics.median(column) for column in zip(*steady, strict=True))
        line = f"{name:<28}{rounds[0][0] * 1e3:>6.0f} ms{blocked * 1e3:>6.0f} ms{whole * 1e3:>6.0f} ms"
        line += f"{num_bytes / whole / 1e9:>7.2f}"
        if base := bases.get(name):
            ratios = [own[0] / other[0] for own, other in zip(steady, seconds[base][1:], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            line += f"   {middle:.2f} ({low:.2f}-{high:.2f}) to {base}"
        print(line, flush=True)


def commit_small(rank: int, world_size: int, folder: Path) -> None:
    """Save a small model on several processes; rank 0 prints the median."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size)
    store = CheckpointStore(folder / "small")
    seconds = []
    for step in range(12):
        tensors = {f"layer{i}": torch.zeros(64, 64) for i in range(20)}
        dist.barrier()
        start = time.perf_counter()
        content = Content({"model": tensors}, {"optim": tensors}, {"step": step}, {"rank": rank})
        store.save(step, content, run_id="bench")
        seconds.append(time.perf_counter() - start)
    store.close()
    if rank == 0:
        print(f"\ncommit of a small model by {world_size} processes: {statistics.median(seconds[2:]) * 1e3:.0f} ms")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=400, help="of model and optimizer state together")
    parser.add_argument("--width", type=int, default=1024, help="of a layer, whose matrix is width x width")
    parser.add_argument("--json", type=Path, help="write the seconds there as well")
    parser.add_argument("--folder", type=Path, help="where to write; the disk of it is what is measured")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        store = dist.FileStore(str(folder / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=5))
        layer_bytes = 3 * 4 * args.width * (args.width + 1)
        contenders = Contenders(folder, max(1, round(args.megabytes * 1e6 / layer_bytes)), args.width)
        print(f"{contenders.num_bytes / 1e6:.0f} MB in {len(contenders.tensors)} tensors, {os.cpu_count()} cores\n")
        bases = {"trainloop": "safetensors + fsync", "trainloop async": "memcpy into reused buffers"}
        saves = measure(contenders.saves, contenders.rest, args.rounds)
        table(saves, contenders.num_bytes, bases, False)
        print()
        loads = measure(contenders.loads, contenders.rest, args.rounds)
        table(loads, contenders.num_bytes, {"trainloop, verified": "safetensors load"}, True)
        if args.json is not None:
            measured = {"bytes": contenders.num_bytes, "saves": saves, "loads": loads}
            args.json.write_text(json.dumps(measured))
        dist.destroy_process_group()
        context = multiprocessing.get_context("forkserver")
        processes = [context.Process(target=commit_small, args=(rank, 8, folder)) for rank in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
