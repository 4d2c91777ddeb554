"""Kills, stops or breaks one rank of a run at each of its phases, and writes what the others said of it.

Usage: python peers.py OUT NUM_RANKS STRATEGY ("ddp" or "fsdp2")
The ranks are forked, so that each of many short runs needn't import torch again; no launcher helps them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainloop.checkpoint.save.saving as saving
from tests.launching import free_port
from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EvaluationHook

SCENARIOS = {
    # name: (phase, what happens to the rank, -1: the last, step)
    "forward": ("forward", "dies", -1, 2),
    "first rank": ("forward", "dies", 0, 2),
    "backward": ("backward", "dies", -1, 2),
    "control": ("control", "dies", -1, 2),
    "message": ("message", "dies", -1, 2),
    "vote": ("write", "dies", -1, 2),
    "vote of a thread": ("thread", "dies", -1, 2),
    "evaluation": ("evaluation", "dies", -1, 3),
    "build": ("build", "dies", -1, 0),
    "error": ("forward", "raises", -1, 2),
    "hang": ("forward", "stops", -1, 2),
    "frozen": ("forward", "freezes", -1, 2),
}
TIMEOUT = 60.0  # where a rank dies or fails: nobody should wait for it
SHORT_TIMEOUT = 8.0  # where it hangs
LIMIT = 90.0  # for a whole run


class Trainer(BaseTrainer):
    def __init__(self, name: str, out: Path, **kwargs: Any) -> None:
        self.where, self.fate, self.victim, self.at = SCENARIOS[name]
        self.out, self.is_async = out, self.where == "thread"
        timeout = SHORT_TIMEOUT if self.fate in ("stops", "freezes") else TIMEOUT
        super().__init__(4, workspace=out / name, seed=0, timeout=timeout, **kwargs)

    def strike(self, phase: str) -> None:
        """What happens to the one rank."""
        own = self.accelerator.process_index
        if phase != self.where or own != self.victim % self.accelerator.num_processes or self.step != self.at:
            return
        (self.out / "struck").write_text(str(time.time()))
        if self.fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fate == "raises":
            raise ValueError("sample 17 is broken")
        elif self.fate == "freezes":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(LIMIT)

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(24, 8)), batch_size=2)

    def build_eval_data_loader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(24, 8)), batch_size=2)

    def build_model(self) -> nn.Module:
        self.strike("build")
        return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def build_optimizer(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return [CheckpointingHook(2, async_save=self.is_async), EvaluationHook(3)]

    def forward(self, batch: Any) -> Any:
        self.strike("forward")
        output = self.model(batch[0])
        if output.requires_grad:
            output.register_hook(lambda grad: self.strike("backward"))
        return output.pow(2).mean(), {}

    def eval_forward(self, batch: Any) -> Any:
        self.strike("evaluation")
        return super().eval_forward(batch)


def rank_main(name: str, out: Path, strategy: str) -> None:
    if strategy == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "50"}
    trainer = Trainer(name, out)
    write, start = saving.write_draft, trainer.control.start

    def write_or_die(*args: Any) -> Any:
        trainer.strike("write")
        trainer.strike("thread")
        return write(*args)

    def start_or_die(*args: Any, **kwargs: Any) -> None:
        trainer.strike("control")
        start(*args, **kwargs)
        trainer.strike("message")

    saving.write_draft = write_or_die
    trainer.control.start = start_or_die  # type: ignore[method-assign]
    try:
        trainer.train()
    except Exception as ex:
        told = {"error": f"{type(ex).__name__}: {ex}", "cause": repr(ex.__cause__), "at": time.time()}
        (out / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
        raise


def run(name: str, folder: Path, num_ranks: int, strategy: str) -> dict[str, Any]:
    """One run: each rank's process id, exit status, and what it said."""
    out = folder / strategy / name
    out.mkdir(parents=True)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    pids = []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {**where, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
            try:
                rank_main(name, out, strategy)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    ended: set[int] = set()
    victim, end = SCENARIOS[name][2] % num_ranks, time.monotonic() + LIMIT
    while not ended >= set(range(num_ranks)) - {victim} and time.monotonic() < end:
        ended |= {rank for rank, pid in enumerate(pids) if rank not in ended and os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.02)
    for rank in set(range(num_ranks)) - ended:  # the victim, if it hangs; and whoever should not
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    said = {rank: json.loads(path.read_text()) for rank in range(num_ranks) if (path := out / f"{rank}.json").exists()}
    struck = float((out / "struck").read_text())
    for told in said.values():
        told["seconds"] = told.pop("at") - struck
    return {"victim": victim, "pid": pids[victim], "ended": sorted(ended - {victim}), "said": said}


if __name__ == "__main__":
    folder, num_ranks, strategy = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    names = sys.argv[4:] or list(SCENARIOS)
    results = {name: run(name, folder, num_ranks, strategy) for name in names}
    (folder / f"{strategy}.json").write_text(json.dumps(results))
