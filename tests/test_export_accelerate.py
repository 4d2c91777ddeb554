"""Back to Accelerate: what `checkpoints export --format accelerate` writes is read by `accelerator.load_state`."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from trainloop import BaseHook, BaseTrainer, CheckpointingHook
from trainloop.__main__ import main
from trainloop.checkpoint import Checkpoint

from .launching import REPOSITORY, launch
from .test_importing import same
from .workers.foreign import make_lr_scheduler, make_model, make_optimizer

WORKER = REPOSITORY / "tests" / "workers" / "load_state.py"
SAVED, LAST = 4, 7


class Trainer(BaseTrainer):
    """The model of `foreign.py`, on batches that don't depend on anything random."""

    losses: list[float]

    def build_data_loader(self) -> Any:
        return DataLoader(batches().flatten(0, 1), batch_size=8)  # type: ignore[arg-type]

    def build_model(self) -> Any:
        return make_model()

    def build_optimizer(self) -> Any:
        return make_optimizer(self.model)

    def build_lr_scheduler(self) -> Any:
        return make_lr_scheduler(self.optimizer)

    def build_hooks(self) -> list[BaseHook]:
        self.losses = []
        return [CheckpointingHook(SAVED, keep_steps=[SAVED])]

    def forward(self, x: Any) -> Any:
        loss = (self.model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        self.losses.append(loss.item())
        return loss, {}


def batches() -> torch.Tensor:
    """LAST x 8 x 6."""
    return torch.randn(LAST, 8, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder of checkpoints, and the loss of each step."""
    workspace = tmp_path_factory.mktemp("trained")
    trainer = Trainer(LAST, workspace=workspace, seed=3)
    trainer.train()
    return workspace / "checkpoints", trainer.losses


@pytest.mark.parametrize("form", ["single", "ddp2", "fsdp2"])
def test_load_state_reads_it_and_training_goes_on(
    trained: tuple[Path, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """A plain Accelerate script has the model and the optimizer to the bit, the generators of the CPU, and the losses
    that were to come.
    """
    folder, losses = trained
    torch.manual_seed(99)  # the generators of this process are not those that were saved
    random.seed(99)
    np.random.seed(99)
    output = tmp_path / form
    options = ["--step", str(SAVED), "--format", "accelerate", "--output", str(output)]
    assert main(["checkpoints", "export", str(folder), *options, *(["--fsdp2"] if form == "fsdp2" else [])]) == 0
    assert "for `accelerator.load_state`" in capsys.readouterr().out
    torch.save(list(batches()[SAVED:]), tmp_path / "batches.pt")
    launch(WORKER, form, str(output), str(tmp_path / "batches.pt"), str(tmp_path))

    checkpoint = Checkpoint.open(folder / f"step_{SAVED:07d}")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for group, got in (
        ("model", state["model"]),
        ("optim", {f"{name}/{key}": v for name, s in state["optimizer"]["state"].items() for key, v in s.items()}),
    ):
        expected = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(group).items()}
        checkpoint.read_into(group, expected)
        assert same(dict(got), expected), group
    saved_groups = checkpoint.global_state()["optimizer"]["param_groups"]
    for got_group, saved_group in zip(state["optimizer"]["param_groups"], saved_groups, strict=True):
        assert {k: got_group[k] for k in ("lr", "weight_decay", "eps")} == {
            k: saved_group[k] for k in ("lr", "weight_decay", "eps")
        }
        assert tuple(got_group["betas"]) == saved_group["betas"]
    got_losses = json.loads((tmp_path / "losses.json").read_text())
    assert got_losses[:2] == pytest.approx(losses[SAVED : SAVED + 2], rel=1e-6)
    if form == "single":  # with several processes the prepared schedule moves more than once a step
        assert got_losses == pytest.approx(losses[SAVED:], rel=1e-6)
        rng = checkpoint.saved_rank_state(0)["rng"]
        assert torch.equal(state["rng"]["torch"], rng["torch"])
        version, internal, gauss = rng["python"]
        random.setstate((version, tuple(internal), gauss))
        assert state["rng"]["python"] == random.random()
        kind, keys, *rest = rng["numpy"]
        np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
        assert state["rng"]["numpy"] == np.random.rand()


def test_there_and_back_is_the_same(trained: tuple[Path, list[float]], tmp_path: Path) -> None:
    """What was exported is imported again: the run goes on with the losses that were to come."""
    folder, losses = trained
    options = ["--step", str(SAVED), "--format", "accelerate", "--output", str(tmp_path / "out")]
    assert main(["checkpoints", "export", str(folder), *options]) == 0

    class Again(Trainer):
        def build_data_loader(self) -> Any:
            return DataLoader(batches()[SAVED:].flatten(0, 1), batch_size=8)  # type: ignore[arg-type]

        def build_hooks(self) -> list[BaseHook]:
            super().build_hooks()
            return [CheckpointingHook(100, load=tmp_path / "out")]

    trainer = Again(LAST, workspace=tmp_path, seed=9)
    trainer.train()
    assert trainer.losses == losses[SAVED:]


def test_what_cannot_be_meant_is_told(
    trained: tuple[Path, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options of the other format, a file's name, and what no export wrote: a line each, and nothing is written."""
    folder, _ = trained
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    accelerate = ["--format", "accelerate"]
    for options, message in [
        ([*accelerate, "--group", "ema"], "takes the whole run as it was saved: without --group and --dtype"),
        ([*accelerate, "--dtype", "bf16"], "takes the whole run as it was saved: without --group and --dtype"),
        (["--fsdp2"], "--fsdp2 is for --format accelerate"),
        ([*accelerate, "--output", str(tmp_path / "a.safetensors")], "has a file's name"),
        ([*accelerate, "--output", str(tmp_path / "mine"), "--force"], "holds what no export wrote: notes.txt"),
    ]:
        assert main(["checkpoints", "export", str(folder), *options]) == 2
        assert re.search(re.escape(message), capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    output = tmp_path / "out"
    for extra in ([], ["--force"]):
        assert main(["checkpoints", "export", str(folder), *accelerate, "--output", str(output), *extra]) == 0
    names = sorted(path.name for path in output.iterdir())
    assert names == ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"]
