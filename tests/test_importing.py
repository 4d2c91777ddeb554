"""Checkpoints of other tools begin a run: bit for bit what their own tool loads, under any strategy."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import pickle
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import BaseHook, CheckpointError, CheckpointingHook, EmaHook
from trainloop.checkpoint.importing import open_foreign

from .launching import REPOSITORY, launch
from .small import SmallTrainer

WRITER = REPOSITORY / "tests" / "workers" / "foreign.py"
READER = REPOSITORY / "tests" / "workers" / "importing.py"
WRITTEN = {"single": ["single"], "ddp2": ["ddp2"], "fsdp2": ["fsdp2_sharded", "fsdp2_full"]}
KINDS = ["single", "ddp2", "fsdp2_sharded", "fsdp2_full", "save_model", "weights.pt", "origin"]
MOVED_TWICE = {"ddp2", "fsdp2_sharded", "fsdp2_full"}
"""Saved with a schedule that two processes have moved."""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what other tools have written under each strategy, and what they read back."""
    folder = tmp_path_factory.mktemp("foreign")
    for form, kinds in WRITTEN.items():
        launch(WRITER, form, str(folder), *kinds)
    return folder


def same(a: Any, b: Any) -> bool:
    """Whether nested values are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("form", ["single", "ddp2", "fsdp2"])
def test_what_is_loaded_is_what_its_own_tool_loads(foreign: Path, tmp_path: Path, form: str) -> None:
    """Weights, buffers and optimizer of each kind, written under each strategy, are bitwise those that
    `accelerator.load_state`, `load_checkpoint_in_model`, `load_state_dict` or torch's `set_state_dict` give; the log
    says what it is, the step, and what is not taken; and the run goes on.
    """
    launch(READER, form, str(foreign), str(tmp_path), *KINDS)
    for kind in KINDS:
        expected = torch.load(foreign / f"{kind}.expected", weights_only=True)
        got = torch.load(tmp_path / f"{kind}.got", weights_only=True)
        after = json.loads((tmp_path / f"{kind}.json").read_text())
        assert after["sharded"] == (form == "fsdp2")
        assert same(got["model"], expected["model"]), kind
        told, not_taken = next(pair for pair in pairwise(after["log"]) if "not loaded from it: " in pair[1])
        if kind in ("save_model", "weights.pt"):
            assert got["optimizer"] is None
            assert after["step"] == 0
            assert "of weights. Loaded from it: the weights. The run continues after step 0" in told
            assert "everything but the weights" in not_taken
            continue
        assert same(got["optimizer"]["state"], expected["optimizer"]["state"]), kind
        assert after["went_on_to"] == after["step"] + 1
        assert after["last_epoch"] == after["step"]
        if kind == "origin":
            assert after["step"] == 9
            assert "after step 9 (the checkpoint says it)" in told
            assert "the position in the data" in not_taken
            assert "the hook's state in wandb.pt" in not_taken
            parameters = [name for name in got["ema"] if "running" not in name and "num_batches" not in name]
            assert same({n: got["ema"][n] for n in parameters}, {n: expected["ema"][n] for n in parameters})
            assert not torch.equal(got["ema"]["0.weight"], got["model"]["0.weight"])
            assert after["num_updates"] == 2
        else:
            assert after["step"] == 4
            assert "an `accelerator.save_state` folder" in told
            assert "after step 4 (by the optimizer's step counters)" in told
            assert "random generators" in not_taken
        if kind in MOVED_TWICE:
            assert "which stood at 8 after 4 steps" in not_taken
            lr = torch.load(foreign / "single.expected", weights_only=True)["optimizer"]["param_groups"]
            assert [g["lr"] for g in got["optimizer"]["param_groups"]] == [g["lr"] for g in lr], "the corrected one"
        else:
            assert same(got["optimizer"]["param_groups"], expected["optimizer"]["param_groups"]), kind


def start(tmp_path: Path, load: Any, *hooks: BaseHook, **kwargs: Any) -> SmallTrainer:
    given = [*hooks, CheckpointingHook(1, load=load)]
    trainer = SmallTrainer(0, workspace=tmp_path, hooks_=lambda self: given, **kwargs)
    trainer.train()
    return trainer


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    """A file of weights, an optimizer's file and DCP's metadata: each is read without the right to call anything."""
    marker = tmp_path / "was_run"

    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    file = tmp_path / "weights.pt"
    torch.save({"weight": Malicious()}, file)
    accelerate = tmp_path / "state"
    accelerate.mkdir()
    torch.save({"state": Malicious(), "param_groups": []}, accelerate / "optimizer.bin")
    sharded = tmp_path / "sharded" / "pytorch_model_fsdp_0"
    sharded.mkdir(parents=True)
    (sharded / ".metadata").write_bytes(pickle.dumps(Malicious()))
    for path, message in [
        (file, "cannot be read with `torch.load(weights_only=True)`"),
        (accelerate, "cannot be read with `torch.load(weights_only=True)`"),
        (sharded.parent, "which DCP's metadata has no use for"),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            start(tmp_path / "run", path)
    assert not marker.exists()
    pickle.loads((sharded / ".metadata").read_bytes())
    assert marker.exists(), "it would have"


def test_latest_never_loads_what_another_tool_has_written(tmp_path: Path) -> None:
    """It raises, and names what would load it."""
    folder = tmp_path / "checkpoints" / "checkpoint_3"
    folder.mkdir(parents=True)
    torch.save(nn.Linear(3, 1).state_dict(), folder / "pytorch_model.bin")
    torch.save({"state": {}, "param_groups": [{"lr": 1.0, "params": [0, 1]}]}, folder / "optimizer.bin")
    with pytest.raises(CheckpointError, match=re.escape(f"to begin with it, name it: `load={str(folder)!r}`")):
        start(tmp_path, "latest")
    trainer = start(tmp_path, folder)
    assert trainer.optimizer.param_groups[0]["lr"] == 1.0


def test_where_nothing_else_counts_steps_the_schedule_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SGD keeps no counters: the position of a prepared schedule, over the number of processes that saved it."""
    caplog.set_level(logging.INFO, "trainloop")
    folder = tmp_path / "state"
    folder.mkdir()
    torch.save(nn.Linear(3, 1).state_dict(), folder / "pytorch_model.bin")
    momentum = {i: {"momentum_buffer": torch.ones(shape)} for i, shape in enumerate([(1, 3), (1,)])}
    torch.save({"state": momentum, "param_groups": [{"lr": 1.0, "params": [0, 1]}]}, folder / "optimizer.bin")
    torch.save({"last_epoch": 12}, folder / "scheduler.bin")
    for num_processes, step in [(1, 12), (2, 6)]:
        (folder / f"random_states_{num_processes - 1}.pkl").touch()
        trainer = start(
            tmp_path / str(num_processes),
            folder,
            lr_scheduler_=lambda self: torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5),
        )
        assert trainer.step == step
        assert f"after step {step} (by its schedule alone, which stood at 12" in caplog.text
        assert trainer.lr_scheduler.last_epoch == step
        assert all(torch.equal(s["momentum_buffer"], torch.ones_like(p)) for p, s in trainer.optimizer.state.items())


def test_own_checkpoints_are_not_forgotten_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A restarted command that still names the import says that the run has newer checkpoints of its own."""
    file = tmp_path / "w.pt"
    torch.save(nn.Linear(3, 1).state_dict(), file)
    trainer = start(tmp_path, file)
    assert not any("has checkpoints up to" in line for line in caplog.messages)
    trainer.max_steps = 2
    trainer.train()
    start(tmp_path, str(file))
    assert any("has checkpoints up to step 2. They are not loaded" in line for line in caplog.messages)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """Wrong names, shapes or groups: the error names them, and every weight is as it was."""
    good = nn.Linear(3, 1).state_dict()
    group = {"lr": 1.0, "params": [0, 1]}

    def folder(name: str, model: Any, optimizer: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        torch.save(model, path / "pytorch_model.bin")
        torch.save(optimizer, path / "optimizer.bin")
        return path

    def momentum(*shape: int) -> dict[int, Any]:
        return {0: {"momentum_buffer": torch.zeros(shape)}}

    cases = [
        (folder("a", {"weight": good["weight"]}, {"state": {}, "param_groups": [group]}), "1 not in the file: bias."),
        (folder("b", {**good, "x": good["bias"]}, {"state": {}, "param_groups": [group]}), "1 not in the model: x."),
        (
            folder("c", nn.Linear(4, 1).state_dict(), {"state": {}, "param_groups": [group]}),
            "weight is [1, 4] there, but [1, 3] here",
        ),
        (folder("d", good, {"state": {}, "param_groups": [group, group]}), "has 2 parameter groups, here it has 1"),
        (folder("e", good, {"state": {}, "param_groups": [{"params": [0]}]}), "holds 1 parameters, here 2"),
        (folder("f", good, {"state": momentum(1, 5), "param_groups": [group]}), "momentum_buffer of weight in"),
        (folder("g", good, {"lr": 1}), "holds no optimizer's state"),
        (folder("h", {"a": {"b": 1}}, {"state": {}, "param_groups": [group]}), "holds no model's state"),
    ]
    for path, message in cases:
        before: dict[str, Any] = {}
        trainer = SmallTrainer(
            0, workspace=tmp_path / "run", hooks_=lambda self, path=path: [CheckpointingHook(1, load=path)]
        )
        trainer._build()
        before = {name: tensor.clone() for name, tensor in trainer.live_model_state().items()}
        with pytest.raises(CheckpointError, match=re.escape(message)):
            trainer.train()
        assert same(dict(trainer.live_model_state()), before)


def test_names_of_wrapped_and_tied_models_are_understood(tmp_path: Path) -> None:
    """What a compiled model under DDP has saved; and safetensors, which keeps one of two tied tensors."""
    import safetensors.torch

    state = nn.Linear(3, 1).state_dict()
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, tmp_path / "wrapped.pt")
    assert same(dict(start(tmp_path, tmp_path / "wrapped.pt").live_model_state()), dict(state))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(self.a(x))
            return out

    model = Tied()
    safetensors.torch.save_model(model, str(tmp_path / "tied.safetensors"))
    trainer = start(tmp_path, tmp_path / "tied.safetensors", model_=lambda self: Tied())
    assert same(dict(trainer.live_model_state()), dict(model.state_dict()))


def trained_by_hand(num_steps: int) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A model, an average of it and an AdamW after some steps of a plain loop."""
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    for _ in range(num_steps):
        model(torch.rand(4, 3)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for own, param in zip(average.parameters(), model.parameters(), strict=True):
                own.lerp_(param, 0.5)
    return model, average, optimizer


@pytest.mark.parametrize("form", ["lucidrains", "DiT", "nanoGPT", "DDP"])
def test_files_that_scripts_make_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str) -> None:
    """Model, average, optimizer, step and loss scale come from where the usual scripts put them, to the bit."""
    model, average, optimizer = trained_by_hand(5)
    state, opt = model.state_dict(), optimizer.state_dict()
    # As ema_pytorch's `EMA` has it: the trained model, the average, and counters.
    inner = {f"ema_model.{name}": tensor for name, tensor in average.state_dict().items()}
    inner |= {f"online_model.{name}": tensor for name, tensor in state.items()}
    inner |= {"initted": torch.tensor(True), "step": torch.tensor(5)}
    saved = {
        "lucidrains": {"step": 5, "model": state, "opt": opt, "ema": inner, "scaler": None, "version": "2.2.5"},
        "DiT": {"model": state, "ema": average.state_dict(), "opt": opt, "args": argparse.Namespace(lr=0.3)},
        "nanoGPT": {
            "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
            "optimizer": opt,
            "model_args": {"n_layer": 1},
            "iter_num": 5,
            "best_val_loss": torch.tensor(1.5),
            "config": {"lr": 0.3},
        },
        "DDP": {
            "epoch": 2,
            "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            "optimizer": opt,
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        },
    }[form]
    torch.save(saved, tmp_path / "mine.pt")
    ema = EmaHook(0.5)

    def begin() -> SmallTrainer:
        hooks = [ema] if form in ("lucidrains", "DiT") else []
        adamw: Any = lambda self: torch.optim.AdamW(self.model.parameters())  # noqa: E731
        return start(tmp_path / "run", tmp_path / "mine.pt", *hooks, optimizer_=adamw)

    if form == "DiT":
        with pytest.raises(CheckpointError, match=r"holds an object of argparse\.Namespace.*add_safe_globals\("):
            begin()
    with caplog.at_level(logging.INFO), torch.serialization.safe_globals([argparse.Namespace]):
        trainer = begin()
    assert trainer.step == 5
    assert same(dict(trainer.live_model_state()), dict(state))
    own = trainer._raw_optimizer.state_dict()
    assert same(own["state"], opt["state"])
    assert own["param_groups"][0]["lr"] == 0.3
    if form in ("lucidrains", "DiT"):
        assert same(dict(zip(average.state_dict(), ema._averages, strict=True)), dict(average.state_dict()))
        assert ema.num_updates == 5
    rest = {"lucidrains": "version", "DiT": "args", "nanoGPT": "model_args, best_val_loss, config", "DDP": "epoch"}[
        form
    ]
    assert f"not loaded from it: what it has under {rest}" in caplog.text


def test_only_what_is_known_is_opened(tmp_path: Path) -> None:
    """A folder without weights, or with several files of them, is told as it is."""
    with pytest.raises(CheckpointError, match="cannot be imported: it is empty"):
        open_foreign(tmp_path)
    for name in "ab":
        torch.save(nn.Linear(3, 1).state_dict(), tmp_path / f"{name}.pt")
    with pytest.raises(CheckpointError, match=re.escape("Give the file itself: a.pt, b.pt")):
        open_foreign(tmp_path)
