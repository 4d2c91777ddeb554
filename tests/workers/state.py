"""Models, optimizers and buffers whose state is not plain: each runs through, and is stopped, started again and run on.

Usage: accelerate launch state.py OUT [case...]
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.workers import buffers
from tests.workers.non_finite import digest
from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook

STEPS, STOP = 6, 3


class HalfLinear(nn.Linear):
    """Saves copies in fp16, under names of its own."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, param in self.named_parameters():
            destination[f"{prefix}{name}_fp16"] = param.detach().half()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, param in self.named_parameters():
            param.detach().copy_(state_dict[f"{prefix}{name}_fp16"])


class SameNames(nn.Linear):
    """Saves copies in fp16 under the parameters' names."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, param in self.named_parameters():
            destination[prefix + name] = param.detach().half()


class Extra(nn.Module):
    """Extra state that it needs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.counts = kind, {"seen": 0, "by_name": {1: (2, 3)}}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts["seen"] += len(x)
        return x * (1 + self.counts["seen"] / 100)

    def get_extra_state(self) -> Any:
        return torch.tensor([self.counts["seen"]]) if self.kind == "tensor" else dict(self.counts)

    def set_extra_state(self, state: Any) -> None:
        if self.kind == "tensor":
            self.counts["seen"] = int(state)
        else:
            assert state["by_name"] == {1: (2, 3)}
            self.counts = dict(state)


class Lookahead(torch.optim.Optimizer):
    """An inner Adam, slow weights, and a counter."""

    def __init__(self, inner: torch.optim.Optimizer, interval: int = 2) -> None:
        self.inner, self.interval, self.num_steps = inner, interval, 0
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.num_steps += 1
        for group in self.param_groups:
            for param in group["params"]:
                slow = self.state[param].setdefault("slow", param.detach().clone())
                if self.num_steps % self.interval == 0:
                    slow.lerp_(param, 0.5)
                    param.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inner = state_dict["inner"]
        self.num_steps = state_dict["num_steps"]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.inner.load_state_dict(inner)
        self.param_groups = self.inner.param_groups


class OddKeys(torch.optim.SGD):
    """State under keys that are no parameters, and under keys with a slash, of a parameter and of none."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        whole = self.state["whole"]
        whole["num/steps"] = whole.get("num/steps", 0) + 1
        self.state[7] = {"scale": torch.tensor([1.0 / whole["num/steps"]]), 3: (1, 2)}
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                own = self.state[param]
                for key in ("m/v", "m", 0, "$items"):
                    own[key] = 0.5 * own.get(key, torch.zeros_like(param)) + param.grad
                param.grad += (own["m/v"] + own["m"] + own[0] + own["$items"]) * self.state[7]["scale"].item()
        super().step()


def adam(trainer: BaseTrainer) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)


def linear() -> nn.Module:
    return nn.Linear(3, 1)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[BaseTrainer], torch.optim.Optimizer]]] = {
    "HalfLinear": (lambda: nn.Sequential(nn.Linear(3, 8), HalfLinear(8, 1)), adam),
    "SameNames": (lambda: nn.Sequential(nn.Linear(3, 8), SameNames(8, 1)), adam),
    "extra tensor": (lambda: nn.Sequential(Extra("tensor"), nn.Linear(3, 1)), adam),
    "extra dict": (lambda: nn.Sequential(Extra("dict"), nn.Linear(3, 1)), adam),
    "Lookahead": (linear, lambda trainer: Lookahead(torch.optim.Adam(trainer.model.parameters(), lr=1e-2))),
    "OddKeys": (linear, lambda trainer: OddKeys(trainer.model.parameters(), lr=1e-2, momentum=0.9)),
    **{kind: (lambda kind=kind: buffers.Net(kind), adam) for kind in buffers.KINDS},
}


class Halve(BaseHook):
    """Rounds the weights to fp16 after the step that is saved, so that what is saved in fp16 is exact."""

    def on_after_optimizer_step(self, trainer: BaseTrainer) -> None:
        with torch.no_grad():
            for param in trainer.model.parameters():
                param.copy_(param.half())


class Trainer(BaseTrainer):
    def __init__(self, case: str, folder: Path | None, **kwargs: Any) -> None:
        self.case, self.folder, self.load = case, folder, kwargs.pop("load", "latest")
        super().__init__(kwargs.pop("max_steps", STEPS), seed=3, **kwargs)

    def build_data_loader(self) -> Any:
        x = torch.randn(12 * STEPS, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), batch_size=4)

    def build_model(self) -> nn.Module:
        torch.manual_seed(2)
        return CASES[self.case][0]()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return CASES[self.case][1](self)

    def build_hooks(self) -> list[BaseHook]:
        saving = [] if self.folder is None else [CheckpointingHook(100, path=self.folder, load=self.load)]
        return [Halve(), EmaHook(0.5), *saving]

    def forward(self, batch: Any) -> Any:
        return self.model(batch[0]).pow(2).mean(), {}


def end(trainer: Trainer) -> list[Any]:
    """What the ends of two runs are compared by."""
    trainer.train()
    model = trainer.unwrapped_model
    seen = [module.counts["seen"] for module in model.modules() if isinstance(module, Extra)]
    averages = [average.sum().item() for average in trainer.hooks[1]._averages]  # type: ignore[attr-defined]
    return [digest(trainer), repr(trainer._raw_optimizer.state.get(7)), seen, averages]


def main() -> None:
    out = Path(sys.argv[1])
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    for case in sys.argv[2:] or CASES:
        try:
            whole = end(Trainer(case, None))
            folder = out / case.replace(" ", "_")
            end(Trainer(case, folder, max_steps=STOP))
            results[case] = [whole, end(Trainer(case, folder))]
        except Exception as ex:
            results[case] = [f"{type(ex).__name__}: {ex}"]
    rank = Trainer("HalfLinear", None).accelerator.process_index
    (out / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
