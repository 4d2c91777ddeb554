"""What a save costs beside the bare copy to the host and beside DCP, on a GPU: `python -m benchmarks.gpu.saves`."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from trainloop import BaseTrainer, CheckpointingHook, Trainer

from ..checkpoint import nothing
from ..tasks import TEXTS, loss_of, make_model

Timings = dict[str, list[tuple[float, float]]]
"""By contender: for each round the seconds for which training is blocked, and until the checkpoint is whole."""


def trainer_of(folder: Path, model_name: str, device: str, is_async: bool) -> BaseTrainer:
    """A trainer that has done one step, so that AdamW has its state, and whose folder is open."""
    model = make_model(model_name)
    vocabulary, length = TEXTS[model_name]
    tokens = torch.randint(vocabulary, (1, length + 1))
    hook = CheckpointingHook(10**9, async_save=is_async)
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        data_loader=[(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())],
        forward=lambda model, batch: (loss_of(model(batch[0]), batch[1]), {}),
        hooks=[hook],
        max_steps=1,
        workspace=folder,
        device=device,
        seed=0,
    )
    trainer.train()
    hook.on_before_train(trainer)  # opens the folder again
    return trainer


class Contenders:
    """Each way to save, on the tensors of one trainer; trainloop has a second one for its asynchronous saves."""

    def __init__(self, folder: Path, model_name: str, device: str) -> None:
        self.device = torch.device(device)
        self.trainers = {a: trainer_of(folder / f"ours{a}", model_name, device, a) for a in (False, True)}
        trainer = self.trainers[False]
        states = get_state_dict(trainer.unwrapped_model, trainer._raw_optimizer)
        self.nested = {"model": states[0], "optim": states[1]}
        optimizer_tensors = [t for state in trainer._raw_optimizer.state.values() for t in state.values()]
        model_tensors = list(trainer.unwrapped_model.parameters())
        self.model_bytes = sum(tensor.nbytes for tensor in model_tensors)
        self.tensors = [tensor.detach() for tensor in [*model_tensors, *optimizer_tensors]]
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors)
        is_cuda = self.device.type == "cuda"
        self.buffers = [torch.empty(t.shape, dtype=t.dtype, pin_memory=is_cuda) for t in self.tensors]
        self.group = dist.new_group(backend="gloo")
        self._folder = folder
        self._numbers = itertools.count()
        self._superseded: list[Path] = []

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def fresh(self, name: str) -> Path:
        folder = self._folder / f"{name}{next(self._numbers)}"
        self._superseded.append(folder)
        return folder

    def copy(self) -> None:
        for buffer, tensor in zip(self.buffers, self.tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self.synchronize()

    def dcp_save(self) -> None:
        dcp.save(self.nested, checkpoint_id=self.fresh("dcp"))

    def dcp_async(self) -> None:
        self.future = dcp.async_save(self.nested, checkpoint_id=self.fresh("async"), process_group=self.group)

    def ours(self, is_async: bool) -> None:
        trainer: Any = self.trainers[is_async]
        trainer.step += 1
        trainer.hooks[0]._save(trainer, is_final=False)

    def rest(self) -> None:
        """Until nothing is in flight, and what is superseded is gone."""
        for trainer in self.trainers.values():
            store = trainer.hooks[0]._store  # type: ignore[attr-defined]
            assert store is not None
            store.wait()
        for folder in self._superseded:
            shutil.rmtree(folder, ignore_errors=True)
        self._superseded = []
        self.synchronize()

    def saves(self) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
        """Name, what blocks, and what comes after it before the checkpoint is whole."""
        yield "copy into pinned memory", self.copy, nothing
        yield "trainloop async", partial(self.ours, True), self.rest
        yield "DCP async_save", self.dcp_async, lambda: self.future.result()
        yield "trainloop", partial(self.ours, False), nothing
        yield "DCP save", self.dcp_save, nothing

    def peak_of(self, work: Callable[[], Any]) -> float:
        """Device memory that `work` needs at its peak beyond what is there, as a share of the model's bytes."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / self.model_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="GPT 124M", choices=TEXTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=45, help="begin no contender later than this")
    parser.add_argument("--json", type=Path, required=True, help="write the result there, again after each round")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = dist.FileStore(str(folder / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        contenders = Contenders(folder, args.model, args.device)
        seconds: Timings = {}
        result: dict[str, Any] = {"bytes": contenders.num_bytes, "saves": seconds, "peaks": {}}
        for _ in range(args.rounds + 1):
            for label, work, finish in contenders.saves():
                contenders.rest()
                if time.monotonic() > end:
                    break
                start = time.perf_counter()
                work()
                blocked = time.perf_counter() - start
                finish()
                seconds.setdefault(label, []).append((blocked, time.perf_counter() - start))
            args.json.write_text(json.dumps(result))
        contenders.rest()
        if args.device == "cuda":
            for label, is_async in (("trainloop async", True), ("trainloop", False)):
                result["peaks"][label] = contenders.peak_of(partial(contenders.ours, is_async))
            args.json.write_text(json.dumps(result))
        contenders.rest()
        for trainer in contenders.trainers.values():
            trainer.hooks[0].on_after_train(trainer)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
