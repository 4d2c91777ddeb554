"""Averages weights and evaluates in many ways in one launch, and writes what each rank ended with.

Usage: accelerate launch evaluation.py FOLDER NAME [signal]
Checkpoints in FOLDER that other launches have written are loaded. With "signal" one run is all there is, which gets
SIGTERM in the middle of an evaluation, if it has not gone on from a checkpoint.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MaxMetric, MeanSquaredError

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, EvaluationHook
from trainloop.ranks import collectives
from trainloop.testing.comparison import differences, flat

NUM_SAMPLES = 27  # seven batches of four: divisible by neither two nor three, and the last one is not full
STEPS = 5


def samples(num: int) -> torch.Tensor:
    """Num x 3: noise, the sample's number, and how much it weighs."""
    noise = torch.randn(num, generator=torch.Generator().manual_seed(1))
    return torch.stack([noise, torch.arange(num).double().float(), torch.arange(num) % 3 + 1.0], 1)


class Augmented(Dataset[Any]):
    """Draws from the process's generator for each sample."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return samples(NUM_SAMPLES)[index] + torch.randn(3) * torch.tensor([1.0, 0, 0])


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(samples(NUM_SAMPLES))


class Trainer(BaseTrainer):
    is_noisy = is_weighted = False
    with_hooks: tuple[BaseHook, ...] = ()

    def build_data_loader(self) -> Any:
        return DataLoader(Augmented(), batch_size=3, shuffle=True)

    def build_eval_data_loader(self) -> Any:
        return DataLoader(TensorDataset(samples(NUM_SAMPLES)), batch_size=4, shuffle=True, collate_fn=self.collate)

    @staticmethod
    def collate(batch: Any) -> torch.Tensor:
        return torch.stack([sample[0] if isinstance(sample, tuple) else sample for sample in batch])

    def build_model(self) -> nn.Module:
        self.mean_squared_error, self.max_metric = MeanSquaredError(), MaxMetric()
        model = nn.Sequential(
            nn.Linear(1, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.4),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 1),
        )
        model[3].bias.requires_grad_(False)
        return model

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return list(self.with_hooks)

    def forward(self, batch: Any) -> Any:
        return (self.model(batch[:, :1]) - 1).pow(2).mean(), {}

    def eval_forward(self, batch: Any) -> Any:
        x, number = batch[:, :1], batch[:, 1].long()
        y = self.model(x + torch.randn_like(x) if self.is_noisy else x)
        errors = (y - 1).pow(2)
        loss = (errors[:, 0] * batch[:, 2]).sum() / batch[:, 2].sum() if self.is_weighted else errors.mean()
        self.mean_squared_error.update(y, torch.ones_like(y))
        self.max_metric.update(number.float())
        records = {
            "count": len(number),
            "numbers": {"sum": number.sum(), "squares": (number**2).sum(), "largest": number.max()},
            "x": x.mean(),
            "metrics": {"mse": self.mean_squared_error, "largest": self.max_metric},
        }
        return loss, records

    def batch_weight(self, batch: Any) -> Any:
        return batch[:, 2].sum() if self.is_weighted else None


REDUCE: Any = {"count": "sum", "numbers/sum": "sum", "numbers/squares": "sum", "numbers/largest": "max"}


def make(*hooks: BaseHook, **kwargs: Any) -> Trainer:
    trainer = Trainer(kwargs.pop("max_steps", STEPS), gradient_accumulation_steps=2, seed=3, grad_clip=1.0, **kwargs)
    trainer.with_hooks = hooks
    return trainer


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor without its shards. Call on every rank."""
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}


def evaluations() -> dict[str, Any]:
    """The same model on the same data, in every kind of container."""
    collate = Trainer.collate
    stack = samples(NUM_SAMPLES)
    results = {}
    for name, data, is_noisy, is_weighted in (
        ("default", None, False, False),
        ("in_workers", DataLoader(Augmented(), batch_size=4, num_workers=2), False, False),
        ("in_main_process", DataLoader(Augmented(), batch_size=4), False, False),
        ("noisy", None, True, False),
        ("weighted", None, False, True),
        ("iterable_dataset", DataLoader(Streamed(), batch_size=4), False, False),
        ("list", list(stack.split(4)), False, False),
        ("mapping", {"a": list(stack.split(4)), "b": list(stack[:3].split(4))}, False, False),
        ("prepared", "prepared", False, False),
        ("one_batch", DataLoader(TensorDataset(stack[:3]), batch_size=4, collate_fn=collate), False, False),
    ):
        trainer = make()
        trainer._build()
        trainer.is_noisy, trainer.is_weighted = is_noisy, is_weighted
        rank = trainer.accelerator.process_index
        if trainer.accelerator.num_processes > 1:
            trainer.unwrapped_model[1].running_mean.fill_(rank)  # rank 0's are what counts
        if data == "prepared":
            data = trainer.accelerator.prepare(
                DataLoader(TensorDataset(stack), batch_size=4, collate_fn=collate, shuffle=True)
            )
        shards = [type(param) for param in trainer.model.parameters()]
        torch.manual_seed(100 + rank)
        results[name] = trainer.evaluate(data, reduce=REDUCE)
        again = trainer.evaluate(data, reduce=REDUCE)
        assert again == results[name], "an evaluation depends on nothing but weights and data"
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(100 + rank)))
        assert all(module.training for module in trainer.model.modules())
        assert [type(param) for param in trainer.model.parameters()] == shards, "FSDP2 has let go of what it gathered"
        if trainer.accelerator.num_processes > 1:
            assert trainer.unwrapped_model[1].running_mean.eq(rank).all()
    return results


def training_is_untouched() -> list[str]:
    """What differs after a training with evaluations from one without."""
    ends = []
    for with_evaluation in (False, True):
        ema = EmaHook(0.9)
        hooks = [EvaluationHook(2, ema=ema, prefix="ema"), EvaluationHook(1, at_start=True)] if with_evaluation else []
        trainer = make(*hooks, ema)
        trainer.train()
        state = trainer.live_state_dict()
        for key in ("evaluation_val", "evaluation_ema"):
            state.pop(key, None)
        ends.append(flat({**state, "buffers": dict(trainer.unwrapped_model.named_buffers())}))
    return list(differences(*ends))


class Reference(BaseHook):
    """The average of the whole weights, gathered after every step, by its definition."""

    def __init__(self, decay: float) -> None:
        self.decay, self.average = decay, {}  # type: ignore[var-annotated]

    def on_after_step(self, trainer: BaseTrainer) -> None:
        weights = whole({n: p for n, p in trainer.named_parameters().items() if p.requires_grad})
        if not self.average:
            self.average = weights
        else:
            for name, weight in weights.items():
                self.average[name].lerp_(weight, 1 - self.decay)


def averages(folder: Path, name: str) -> dict[str, Any]:
    """The average on shards beside that of the whole weights, what `swapped` does, and a checkpoint."""
    ema, slow, reference = EmaHook(0.9), EmaHook(0.99, name="slow", update_interval=2, device="cpu"), Reference(0.9)
    save = CheckpointingHook(STEPS, path=folder / f"checkpoints_{name}", load=None)
    trainer = make(ema, slow, save, reference)
    trainer.train()
    saved = trainer.state_dict()
    average = whole(saved["ema"])
    facts: dict[str, Any] = {
        "names": sorted(average) == sorted(saved["model"]),
        "reference": list(differences(reference.average, {n: average[n] for n in reference.average})),
        "frozen": list(differences(whole(saved["model"])["3.bias"], average["3.bias"])),
        "average": {n: t.tolist() for n, t in average.items()},
        "slow": {n: t.tolist() for n, t in whole(saved["slow"]).items()},
        "buffers": {n: b.tolist() for n, b in trainer.unwrapped_model.named_buffers()},
    }
    before = flat(trainer.state_dict())
    x = torch.ones(2, 1)
    model = trainer.unwrapped_model  # DDP's forward would share buffers
    model.eval()
    with torch.no_grad():
        model(x)  # FSDP2 now holds the outermost module's weights whole
        try:
            with ema.swapped(trainer):
                inside = model(x)
                facts["inside"] = list(
                    differences(average, whole(trainer.live_model_state()), ignore=["*running*", "*num_batches*"])
                )
                raise KeyError
        except KeyError:
            outside = model(x)
    model.train()
    facts["after"] = list(differences(before, trainer.state_dict()))
    facts["changed"] = not torch.equal(inside, outside)
    try:
        copied = ema.ema_model
        facts["ema_model"] = list(differences(inside, copied(x)))
    except RuntimeError as ex:
        facts["ema_model"] = str(ex)
    return facts


def loaded(folder: Path) -> dict[str, Any]:
    """The average in each checkpoint of another launch, as this launch loads it."""
    found = {}
    for path in sorted(folder.glob("checkpoints_*/step_*")):
        ema, slow = EmaHook(0.9), EmaHook(0.99, name="slow", update_interval=2)
        trainer = make(ema, slow, CheckpointingHook(STEPS, path=folder / "unused", load=path))
        trainer.train()
        state = trainer.state_dict()
        name = path.parent.name.removeprefix("checkpoints_")
        found[name] = {key: {n: t.tolist() for n, t in whole(state[key]).items()} for key in ("ema", "slow")}
        found[name]["num_updates"] = [ema.num_updates, slow.num_updates]
    return found


class Interrupted(Trainer):
    """Sends itself SIGTERM in the evaluation of step 4, on the last rank."""

    is_sent = False

    def eval_forward(self, batch: Any) -> Any:
        is_last = self.accelerator.process_index == self.accelerator.num_processes - 1
        if self.step == 4 and is_last and self.is_sending and not self.is_sent:
            self.is_sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().eval_forward(batch)


class Watch(BaseHook):
    """Writes down what is logged, and how the run ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self.write([trainer.step, records["val"]["loss"]])

    def on_after_train(self, trainer: BaseTrainer) -> None:
        self.write(["end", trainer.step])

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        self.write(["exit", trainer.step, getattr(exception, "code", repr(exception))])


def interrupted(folder: Path, is_sending: bool) -> None:
    folder.mkdir(exist_ok=True)
    trainer = Interrupted(STEPS, seed=3, workspace=folder)
    trainer.is_sending = is_sending and not (folder / "checkpoints").exists()
    trainer.with_hooks = (
        EvaluationHook(2, at_end=False),
        CheckpointingHook(100, exit_signals=["SIGTERM", "SIGUSR1"]),
        Watch(folder / f"{trainer.accelerator.process_index}.jsonl"),
    )
    trainer.train()


def threads() -> set[str]:
    """Those of this process, gloo's included, where the system tells (Linux)."""
    return {thread.name for thread in Path("/proc/self/task").glob("*")}


def tell_the_end(path: Path, ours: set[str]) -> None:
    path.write_text(json.dumps([len(ours) > 0, torch.distributed.is_initialized(), len(ours & threads())]))


if __name__ == "__main__":
    folder, name, *mode = sys.argv[1:]
    if mode:
        interrupted(Path(folder, name), is_sending=True)
    else:
        rank = int(os.environ.get("RANK", "0"))
        ours: set[str] = set()
        atexit.register(tell_the_end, Path(folder, f"{name}.{rank}.exit"), ours)  # first, so called last
        accelerator = Accelerator()
        before = threads()
        collectives.host_group()
        ours |= threads() - before
        found = loaded(Path(folder))
        found.pop(name, None)
        result = {
            "loaded": found,
            "evaluations": evaluations(),
            "untouched": training_is_untouched(),
            "averages": averages(Path(folder), name),
        }
        interrupted(Path(folder, f"uninterrupted_{name}"), is_sending=False)
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(result))
        if name == "ddp3":
            accelerator.end_training()
