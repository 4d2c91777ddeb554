"""What a resume holds in memory: the model and the state of its optimizer, each once."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainloop import CheckpointingHook

from .small import SmallTrainer


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors on the CPU that operations make and that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.live:
                storage = tensor.untyped_storage()
                pointer, num_bytes = storage.data_ptr(), storage.nbytes()
                if num_bytes:
                    self.live.add(pointer)
                    self.now += num_bytes
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, pointer, num_bytes)
        return result

    def forget(self, pointer: int, num_bytes: int) -> None:
        self.live.discard(pointer)
        self.now -= num_bytes


class Large(SmallTrainer):
    """4 MiB of parameters; AdamW keeps 8 MiB."""

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 1024), nn.Linear(1024, 1024, bias=False))
        with torch.no_grad():
            model[1].weight.zero_()
        return model

    def build_optimizer(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def test_a_resume_holds_the_state_of_the_optimizer_once(tmp_path: Path) -> None:
    """At its peak there are the parameters and both moments, and less than a quarter of a parameter's memory more."""
    first = Large(1, workspace=tmp_path, hooks_=lambda self: [CheckpointingHook(1)])
    first.train()
    saved = first.state_dict()["training_state"]["optimizer"]["state"]
    with Peak() as memory:
        second = Large(1, workspace=tmp_path, hooks_=lambda self: [CheckpointingHook(1)])
        second.train()
    assert second.step == 1
    num_bytes = sum(param.nbytes for param in second.model.parameters())
    assert 3 * num_bytes <= memory.peak < 3.25 * num_bytes, memory.peak / num_bytes
    loaded = second.state_dict()["training_state"]["optimizer"]["state"]
    for name, values in saved.items():
        assert all(torch.equal(value, loaded[name][key]) for key, value in values.items()), name


def test_a_state_dict_stays_its_owners(tmp_path: Path) -> None:
    """`load_state_dict` copies: the steps that follow change nothing in what was loaded."""
    trainer = Large(2, workspace=tmp_path)
    trainer.train()
    state_dict = trainer.state_dict()
    moments = state_dict["training_state"]["optimizer"]["state"]
    before = {name: {key: value.clone() for key, value in values.items()} for name, values in moments.items()}
    other = Large(4, workspace=tmp_path)
    other.load_state_dict(state_dict)
    other.train()
    assert other.step == 4
    for name, values in before.items():
        assert all(torch.equal(value, moments[name][key]) for key, value in values.items()), name
