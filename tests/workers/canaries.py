"""Our gradient code beside Accelerate's on the same gradients.

Usage: accelerate launch canaries.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainloop import BaseTrainer
from trainloop.step.gradients import Gradients


class Trainer(BaseTrainer):
    def build_data_loader(self) -> Any:
        return [torch.ones(1, 7)]

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))

    def build_optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradients(trainer: BaseTrainer) -> list[torch.Tensor]:
    for param in trainer.model.parameters():
        param.grad = None
    torch.manual_seed(trainer.accelerator.process_index)
    trainer.model(torch.randn(4, 7)).pow(2).sum().backward()
    return [local(p.grad) for p in trainer.model.parameters()]


def is_torchs_state(trainer: BaseTrainer) -> bool:
    """Whether the live model state is what torch's own function gives: the same names, and the same memory."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    theirs, ours = get_model_state_dict(trainer.model), trainer.live_model_state()
    return ours.keys() == theirs.keys() and all(
        type(tensor) is type(theirs[name]) and local(tensor).data_ptr() == local(theirs[name]).data_ptr()
        for name, tensor in ours.items()
    )


def main() -> None:
    trainer = Trainer(0, seed=0)
    trainer.train()
    gradients(trainer)
    wanted = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 0.5)
    wanted = wanted.full_tensor() if hasattr(wanted, "full_tensor") else wanted
    theirs = [local(p.grad).clone() for p in trainer.model.parameters()]

    gradients(trainer)
    ours = Gradients(trainer.model.parameters(), 0.5, None, trainer.optimizer)
    norm = ours.norm()
    ours.clip(norm, norm.item())
    clipped = [torch.equal(local(p.grad), other) for p, other in zip(trainer.model.parameters(), theirs, strict=True)]

    for param in trainer.model.parameters():
        param.grad = None
    x = torch.full((1, 7), float(trainer.accelerator.process_index + 1))
    with trainer.accelerator.no_sync(trainer.model):
        trainer.model(x).sum().backward()
    held_back = [p.grad for p in trainer.model.parameters()]  # FSDP2 keeps it unsharded until the reduction
    is_held_back = held_back[0] is None or not torch.equal(
        *(g.float() for g in trainer.accelerator.gather(held_back[0].flatten()[None]))
    )
    result = {
        "norm": torch.equal(norm, wanted),
        "clipped": all(clipped),
        "is_fsdp2": any(hasattr(p, "device_mesh") for p in trainer.model.parameters()),
        "no_sync_defers": is_held_back,
        "state": is_torchs_state(trainer),
    }
    Path(sys.argv[1], f"{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
