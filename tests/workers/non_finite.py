"""Puts something non-finite into one window, in many ways in one launch, and writes what each rank ended with.

Usage: accelerate launch non_finite.py OUT [injection...]; with injections: only those, and none of the reports
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, NonFiniteGradientError
from trainloop.data import per_rank

STEPS = 5
BAD_STEP = 3
BATCH = 4  # samples of a micro-batch on one rank
INJECTIONS = ("batch", "loss", "sqrt", "shard")
NO, BATCH_NAN, LOSS_NAN, SQRT, SHARD_INF, NAN_CONSTANT, HUGE = range(7)
KINDS = {"batch": BATCH_NAN, "loss": LOSS_NAN, "sqrt": SQRT, "shard": SHARD_INF, "constant": NAN_CONSTANT, "huge": HUGE}


class Net(nn.Module):
    """BatchNorm, a buffer that `forward` changes, and a parameter under a square root."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_mean", torch.zeros(6))

    def forward(self, x: torch.Tensor, is_zero: bool, spike: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_forwards += 1
        self.last_mean = x.detach().mean(0)  # a new tensor in the buffer's place
        normed = self.norm(self.hidden(x))
        assert self.norm.weight.dtype == self.norm.running_mean.dtype == torch.float32, "under every strategy"
        y = self.out(torch.tanh(normed))
        aux = (self.scale * (0.0 if is_zero else 1.0)).sqrt().sum()
        if spike is not None:  # one element of one weight gets an infinite gradient
            element = self.out.weight.flatten()[spike]
            element.register_hook(lambda grad: torch.full_like(grad, float("inf")))
            aux = aux + element * 0.0
        return y, aux


class Events(BaseHook):
    def __init__(self) -> None:
        self.events: list[list[Any]] = []

    def on_before_step(self, trainer: BaseTrainer) -> None:
        self.lr = trainer.optimizer.param_groups[0]["lr"]

    def on_non_finite_grad(self, trainer: BaseTrainer, retry: int) -> None:
        self.events.append(["retry", trainer.step, retry])

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.events.append(["step", trainer.step, trainer.step_info.non_finite_grad_retry_count, self.lr])


class Trainer(BaseTrainer):
    """Sequential data, in which an additional window with `kind` on `ranks` stands before step `BAD_STEP`."""

    scaler: torch.amp.GradScaler | None = None

    def __init__(self, kind: str | None, ranks: tuple[int, ...], num_bad_windows: int = 1, **kwargs: Any) -> None:
        self.kind, self.bad_ranks, self.num_bad_windows = kind, ranks, num_bad_windows
        self.num_forward_calls = 0
        super().__init__(kwargs.pop("max_steps", STEPS), seed=5, **kwargs)

    def build_data_loader(self) -> Any:
        world, n = self.accelerator.num_processes, self.gradient_accumulation_steps
        window = world * BATCH * n
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(STEPS * window, 6, generator=generator)
        kinds = torch.zeros(len(x), dtype=torch.int64)
        if self.kind is not None:
            bad_x = torch.randn(self.num_bad_windows * window, 6, generator=generator)
            bad_kinds = torch.zeros(len(bad_x), dtype=torch.int64).view(self.num_bad_windows, n, world, BATCH)
            for rank in self.bad_ranks:
                bad_kinds[:, min(1, n - 1), rank] = KINDS[self.kind]
            bad_kinds = bad_kinds.flatten()
            bad_x[bad_kinds == BATCH_NAN, 2] = float("nan")
            at = (BAD_STEP - 1) * window
            x, kinds = torch.cat([x[:at], bad_x, x[at:]]), torch.cat([kinds[:at], bad_kinds, kinds[at:]])
        return DataLoader(TensorDataset(x, kinds), batch_size=BATCH)

    def build_model(self) -> nn.Module:
        torch.manual_seed(2)
        return Net()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=STEPS + 1)

    def build_grad_scaler(self) -> torch.amp.GradScaler | None:
        return self.scaler

    def build_hooks(self) -> list[BaseHook]:
        self.recorder = Events()
        return [self.recorder]

    def forward(self, batch: Any) -> Any:
        self.num_forward_calls += 1
        x, kinds = batch
        kind = int(kinds[0])
        spike = (0 if self.accelerator.process_index == 0 else -1) if kind == SHARD_INF else None
        y, aux = self.model(x, kind == SQRT, spike)
        loss = (y.squeeze(1) - x.sum(1)).pow(2).mean() + 0.1 * aux
        if kind == LOSS_NAN:
            loss = loss * float("nan")
        elif kind == NAN_CONSTANT:
            loss = loss + float("nan")
        elif kind == HUGE:
            loss = loss * 1e25
        return loss, {}


def digest(trainer: BaseTrainer) -> str:
    """Every bit of this rank's parameters, buffers and optimizer state."""
    model = trainer.unwrapped_model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, state in trainer.state_dict()["training_state"]["optimizer"]["state"].items():
        tensors |= {f"{name}/{key}": value for key, value in state.items()}
    total = hashlib.sha256()
    for name in sorted(tensors):
        local = tensors[name].to_local() if hasattr(tensors[name], "to_local") else tensors[name]
        total.update(name.encode())
        total.update(local.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()


def outcome(trainer: Trainer, log: list[str]) -> dict[str, Any]:
    """What is compared, or the error."""
    log.clear()
    result: dict[str, Any] = {}
    try:
        trainer.train()
    except NonFiniteGradientError as ex:
        result["error"] = str(ex)
    result |= {
        "digest": digest(trainer),
        "events": trainer.recorder.events,
        "forwards": trainer.num_forward_calls,
        "grad_norm": trainer.step_info.grad_norm,
        "overflows": trainer.step_info.overflow_count,
        "weight": full(trainer.unwrapped_model.out.weight).tolist(),
        "log": list(log),
    }
    return result


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class SpoilParameter(BaseHook):
    """After step 2 one weight of rank 0's shard is NaN, as after a bit flip."""

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 2 and trainer.accelerator.process_index == 0:
            weight = trainer.unwrapped_model.out.weight.detach()
            (weight.to_local() if hasattr(weight, "to_local") else weight).view(-1)[0] = float("nan")


class SpoiledTrainer(Trainer):
    def build_hooks(self) -> list[BaseHook]:
        return [*super().build_hooks(), SpoilParameter()]


class HopelessTrainer(Trainer):
    """The loss of the last rank is always NaN."""

    def __init__(self, data: str, **kwargs: Any) -> None:
        self.data = data
        super().__init__(None, (), **kwargs)

    def build_data_loader(self) -> Any:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch = (torch.ones(BATCH, 6), torch.zeros(BATCH, dtype=torch.int64))
        if self.data == "map":
            return super().build_data_loader()
        if self.data == "endless":
            return Batches(batch, None)
        return per_rank(Batches(batch, 5 + 2 * (world - rank)))

    def forward(self, batch: Any) -> Any:
        loss, records = super().forward(batch)
        is_last = self.accelerator.process_index == self.accelerator.num_processes - 1
        return loss * float("nan") if is_last else loss, records


class Batches:
    """The same batch, without end or a number of times; without a length either way."""

    def __init__(self, batch: Any, num_batches: int | None) -> None:
        self.batch, self.num_batches = batch, num_batches

    def __iter__(self) -> Any:
        return (
            itertools.repeat(self.batch) if self.num_batches is None else itertools.repeat(self.batch, self.num_batches)
        )


def main() -> None:
    out = Path(sys.argv[1])
    log: list[str] = []
    logger = logging.getLogger("worker")
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)

    results: dict[str, Any] = {}
    probe = Trainer(None, ())
    world = probe.accelerator.num_processes
    rank_sets = [(0,)] if world == 1 else [(0,), (1,), (0, 1)]
    injections = sys.argv[2:] or INJECTIONS
    for n in (1, 4):
        kwargs: dict[str, Any] = {"gradient_accumulation_steps": n, "logger": logger}
        for clip in (None, 0.5):
            results[f"healthy-{n}-{clip}"] = outcome(Trainer(None, (), grad_clip=clip, **kwargs), log)
        for kind, ranks in itertools.product(injections, rank_sets):
            name = f"{kind}-{''.join(map(str, ranks))}-{n}"
            results[f"{name}-None"] = outcome(Trainer(kind, ranks, **kwargs), log)
            if kind == "batch":
                results[f"{name}-0.5"] = outcome(Trainer(kind, ranks, grad_clip=0.5, **kwargs), log)

    if not sys.argv[2:]:
        add_reports(results, world, log, {"logger": logger})
    (out / f"{probe.accelerator.process_index}.json").write_text(json.dumps(results))


def add_reports(results: dict[str, Any], world: int, log: list[str], kwargs: dict[str, Any]) -> None:
    """The limits, what ends a run and what doesn't."""
    last = (world - 1,)
    results["limit-0"] = outcome(Trainer("loss", last, max_non_finite_grad_retries=0, **kwargs), log)
    results["limit-2"] = outcome(Trainer("sqrt", last, 9, max_non_finite_grad_retries=2, **kwargs), log)
    results["limit-3"] = outcome(Trainer("sqrt", last, 3, max_non_finite_grad_retries=3, **kwargs), log)
    for data in ("map", "endless", "uneven"):
        results[f"hopeless-{data}"] = outcome(HopelessTrainer(data, **kwargs), log)
    results["parameter"] = outcome(SpoiledTrainer(None, (), **kwargs), log)
    results["constant"] = outcome(Trainer("constant", (0,), **kwargs), log)
    for clip in (None, 0.5):
        everyone = tuple(range(world))
        results[f"huge-{clip}"] = outcome(Trainer("huge", everyone, max_steps=BAD_STEP, grad_clip=clip, **kwargs), log)
    for scale, name in ((2.0**127, "scaler"), (2.0**16, "scaler-collapse")):
        trainer = Trainer("loss" if name == "scaler-collapse" else None, last, 200, **kwargs)
        trainer.scaler = torch.amp.GradScaler(trainer.device.type, init_scale=scale)
        results[name] = outcome(trainer, log)
        trainer.accelerator.scaler = None  # the next trainer builds its own Accelerator, but let no trace stay


if __name__ == "__main__":
    main()
