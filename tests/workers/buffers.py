"""Models with buffers and frozen parameters of every kind, for the tests of retries, evaluation and resume.

Usage: accelerate launch buffers.py OUT; trains each kind, with and without a bad window and an evaluation.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.workers import non_finite
from trainloop import BaseHook, BaseTrainer, CheckpointingHook

STEPS, BAD_STEP, BATCH = 6, 3, 4


class NoneOnly(nn.Module):
    """Every `nn.InstanceNorm*`, and BatchNorm without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)
        self.images = nn.InstanceNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.images(self.norm(x).unsqueeze(-1).repeat(1, 1, 2)).squeeze(-1).sum(-1) + x


class Expanded(nn.Module):
    """Many elements that are the same memory, which `forward` counts up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("rows", torch.zeros(1, 3).expand(4, 3))
        self.register_buffer("windows", torch.arange(6.0).as_strided((4, 3), (1, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.rows.as_strided((1, 3), (3, 1))
        base += x.detach().mean(0)
        self.windows.as_strided((6,), (1,)).add_(x.detach().sum())
        return x + self.rows.mean() + self.windows.mean()


class Growing(nn.Module):
    """A queue of what was seen, by a new tensor, and one that is resized in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(0, 3))
        self.register_buffer("resized", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.queue = torch.cat([self.queue, x.detach().mean(0, keepdim=True)])
            with torch.no_grad():
                self.resized.resize_(len(self.queue)).fill_(float(x.detach().sum()))
        return x + (self.queue.mean() if len(self.queue) else 0) + self.resized.mean()


class Cache(nn.Module):
    """A table that is made anew, longer, and a plain attribute that says how long, as rotary embeddings have it."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wanted = 3 if self.training else 5
        if wanted > self.length:
            self.length = wanted
            self.register_buffer("table", torch.arange(float(wanted)) / 10, persistent=False)
        assert len(self.table) == self.length
        return x + self.table[:3]


class Late(nn.Module):
    """Registered in mid-run, with what the first batch gives; and a None that becomes a tensor, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", None)
        self.register_buffer("gone", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", x.detach().abs().mean(0))
        self.scale.mul_(0.9).add_(x.detach().abs().mean(0), alpha=0.1)
        self.center = x.detach().mean(0) if self.center is None else 0.5 * self.center
        self.gone = None
        return (x - self.center) * self.scale


class Fp8(nn.Module):
    """Scales in fp8, which know no `isfinite`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3).to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.copy_((self.scale.float() * 0.5 + x.detach().mean(0)).to(torch.float8_e4m3fn))
        return x + self.scale.float()


class Codebook(nn.Module):
    """Frozen parameters that `forward` updates: one under no_grad, one by way of `.data`; and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("codes", "data", "still"):
            setattr(self, name, nn.Parameter(torch.zeros(3), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.detach().mean(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(mean, 0.1)
            self.data.data.copy_(0.9 * self.data.data + 0.1 * mean)
        return x + self.codes + self.data + self.still


class Masks(nn.Module):
    """Frozen infinities, as parameter, as buffer, and made by the first `forward`: meant to be so."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.full((3, 3), float("-inf")).triu(1)
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.register_buffer("other", mask.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", self.other.clone(), persistent=False)
        return x @ (self.mask + self.other + self.late).softmax(-1).T


class Volatile(nn.Module):
    """A statistic that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.3)
        return x - self.mean


KINDS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (NoneOnly, Expanded, Growing, Cache, Late, Fp8, Codebook, Masks, Volatile)
}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.part = KINDS[kind]()
        self.out = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.part(x))


class Evaluate(BaseHook):
    """Evaluates after step 1 and `BAD_STEP`."""

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step in (1, BAD_STEP):
            trainer.evaluate()


class Trainer(BaseTrainer):
    """A bad window before `BAD_STEP` and before the first step, on the last rank, if `is_bad`."""

    def __init__(self, kind: str, is_bad: bool = False, evaluates: bool = False, **kwargs: Any) -> None:
        self.kind, self.is_bad, self.evaluates = kind, is_bad, evaluates
        self.saving: CheckpointingHook | None = kwargs.pop("saving", None)
        super().__init__(kwargs.pop("max_steps", STEPS), max_non_finite_grad_retries=3, seed=5, **kwargs)

    def build_data_loader(self) -> Any:
        world = self.accelerator.num_processes
        x = torch.randn(STEPS * world, BATCH, 3, generator=torch.Generator().manual_seed(1))
        if self.is_bad:
            bad = torch.randn(world, BATCH, 3, generator=torch.Generator().manual_seed(2))
            bad[-1, 1, 1] = float("nan")
            at = (BAD_STEP - 1) * world
            x = torch.cat([bad, x[:at], bad, x[at:]])
        return DataLoader(TensorDataset(x), batch_size=1, collate_fn=lambda samples: samples[0][0])

    def build_eval_data_loader(self) -> Any:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
        return DataLoader(TensorDataset(x), batch_size=4, collate_fn=lambda s: torch.stack([one for (one,) in s]))

    def build_model(self) -> nn.Module:
        torch.manual_seed(2)
        return Net(self.kind)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return [*([Evaluate()] if self.evaluates else []), *([self.saving] if self.saving is not None else [])]

    def forward(self, batch: Any) -> Any:
        return self.model(batch).pow(2).mean(), {}


def main() -> None:
    out = Path(sys.argv[1])
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    for kind in KINDS:
        for name, kwargs in {
            "plain": {},
            "bad": {"is_bad": True},
            "evaluated": {"evaluates": True},
        }.items():
            trainer = Trainer(kind, **kwargs)
            try:
                trainer.train()
                results[f"{kind} {name}"] = non_finite.digest(trainer)
            except Exception as ex:
                results[f"{kind} {name}"] = f"{type(ex).__name__}: {ex}"
    (out / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
