"""Writes checkpoints with the tools that users have them from, and what these tools themselves read back.

Usage: accelerate launch foreign.py OUT kind...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, load_checkpoint_in_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainloop.setup.launch import rehearse_fsdp2_on_cpu

STEPS = 4
STATE_DICT_TYPES = {
    "fsdp2_sharded": StateDictType.SHARDED_STATE_DICT,
    "fsdp2_full": StateDictType.FULL_STATE_DICT,
}


def make_model() -> nn.Module:
    """Buffers of two dtypes, and a first dimension that two ranks cannot share evenly."""
    return nn.Sequential(nn.Linear(6, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Linear(13, 7), nn.Linear(7, 1))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups whose order isn't the model's."""
    params = dict(model.named_parameters())
    biases = [p for name, p in params.items() if name.endswith("bias")]
    weights = [p for name, p in params.items() if name.endswith("weight")]
    return torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=1e-2)


def make_lr_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=40)


class Script:
    """What a hand-written script has, prepared as it usually is."""

    def __init__(self, state_dict_type: Any = None) -> None:
        self.accelerator = Accelerator(cpu=True)
        rehearse_fsdp2_on_cpu(self.accelerator)
        if state_dict_type is not None:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the launch's type
            plugin.set_state_dict_type(state_dict_type)
        torch.manual_seed(5)
        model = make_model()
        optimizer = make_optimizer(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.lr_scheduler = self.accelerator.prepare(make_lr_scheduler(self.optimizer.optimizer))

    def train(self) -> None:
        generator = torch.Generator().manual_seed(self.accelerator.process_index)
        for _ in range(STEPS):
            x = torch.randn(8, 6, generator=generator)
            self.accelerator.backward((self.model(x) - x.sum(1, keepdim=True)).pow(2).mean())
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()

    def whole_state(self) -> dict[str, Any]:
        """Model and optimizer by name, whole, on every rank."""
        options = StateDictOptions(full_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=options)
        return {"model": dict(model), "optimizer": optimizer}


def save_by_hand(script: Script, out: Path) -> None:
    """What else people have on their disks: `save_model`, a torch.save file, a folder of the trainer's origin."""
    model, optimizer = script.accelerator.unwrap_model(script.model), script.optimizer.optimizer
    script.accelerator.save_model(model, str(out / "save_model"), max_shard_size="1KB")  # two files and an index
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, out / "weights.pt")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    with torch.no_grad():
        model[0].weight += 1
        average.update_parameters(model)
        model[0].weight -= 1
    weights, state = get_state_dict(model, optimizer)
    origin = {
        "model": weights,
        "training_state": {
            "step": STEPS + 5,  # what it says, not what the optimizer has counted
            "optimizer": state,
            "lr_scheduler": script.lr_scheduler.state_dict() | {"last_epoch": STEPS + 5},
            "grad_scaler": {},
        },
        "ema": get_model_state_dict(average),
        "wandb": {"run_id": "abc"},
    }
    (out / "origin").mkdir()
    for name, part in origin.items():
        torch.save(part, out / "origin" / f"{name}.pt")


def read_by_hand(out: Path) -> dict[str, Any]:
    """Each of them read by the tool that it was written for."""
    states: dict[str, Any] = {}
    reader = Script()
    load_checkpoint_in_model(reader.model, str(out / "save_model"), strict=True)
    states["save_model"] = reader.whole_state()
    reader = Script()
    reader.model.load_state_dict(torch.load(out / "weights.pt", weights_only=True)["state_dict"])
    states["weights.pt"] = reader.whole_state()
    reader = Script()
    saved = {path.stem: torch.load(path, weights_only=True) for path in (out / "origin").glob("*.pt")}
    set_state_dict(
        reader.model,
        reader.optimizer.optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["training_state"]["optimizer"],
    )
    average = AveragedModel(reader.model)
    set_model_state_dict(average, saved["ema"])
    states["origin"] = {**reader.whole_state(), "ema": dict(average.module.state_dict())}
    return states


def main() -> None:
    out, kinds = Path(sys.argv[1]), sys.argv[2:]
    for kind in kinds:
        script = Script(STATE_DICT_TYPES.get(kind))
        script.train()
        script.accelerator.save_state(str(out / kind))
        reader = Script(STATE_DICT_TYPES.get(kind))
        reader.accelerator.load_state(str(out / kind))
        states = {kind: reader.whole_state()}
        if kind == "single":
            save_by_hand(script, out)
            states |= read_by_hand(out)
        if reader.accelerator.is_main_process:
            for name, state in states.items():
                torch.save(state, out / f"{name}.expected")
    script.accelerator.wait_for_everyone()
    os._exit(0)  # the threads of gloo, left over by what Accelerate and DCP did, now and then abort a process that ends


if __name__ == "__main__":
    main()
