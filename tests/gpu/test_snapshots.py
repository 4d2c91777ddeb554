"""A save copies the state of its moment: whatever training does next never gets into the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import BaseHook, BaseTrainer, CheckpointingHook
from trainloop.checkpoint import Checkpoint, CheckpointStore, Content

from ..small import SmallTrainer
from .devices import on_each_device, synchronize

NUM_SAVES = 4


@on_each_device
def test_weights_that_change_right_after_the_snapshot_never_tear_it(device: str, tmp_path: Path) -> None:
    """The weights come from work that is still queued when the save begins, and are overwritten the moment it returns:
    each of several saves into the same buffers has exactly the values of its moment, bit for bit.
    """
    size = 1024 if device == "cuda" else 128
    generator = torch.Generator(device).manual_seed(0)
    weights = {f"layer{i}": torch.zeros(size, size, device=device) for i in range(24)}
    state = {f"layer{i}/exp_avg": torch.zeros(size, size, device=device) for i in range(24)}
    live = {**weights, **state}
    store = CheckpointStore(tmp_path)
    expected: list[dict[str, torch.Tensor]] = []
    for step in range(1, NUM_SAVES + 1):
        noise = torch.randn(size, size, device=device, generator=generator)
        for _ in range(50 if device == "cuda" else 2):
            noise = torch.nn.functional.normalize(noise @ noise.T) + noise
        for i, tensor in enumerate(live.values()):
            tensor.copy_(noise + i)
        copies = {name: tensor.clone() for name, tensor in live.items()}
        content = Content(weights={"model": weights}, shards={"optim": state}, global_state={"step": step})
        store.save_async(step, content, run_id="torn")
        for tensor in live.values():
            tensor.fill_(float("nan"))
        expected.append(copies)
        if step == NUM_SAVES:
            break
        store.wait()
        _assert_holds(tmp_path, step, expected[-1], weights.keys())
    store.close()
    _assert_holds(tmp_path, NUM_SAVES, expected[-1], weights.keys())


def _assert_holds(folder: Path, step: int, expected: dict[str, torch.Tensor], weights: Any) -> None:
    checkpoint = Checkpoint.open(folder / f"step_{step:07d}")
    assert not checkpoint.find_problems()
    for group, names in (("model", list(weights)), ("optim", [name for name in expected if name not in weights])):
        found = {name: torch.empty_like(expected[name], device="cpu") for name in names}
        checkpoint.read_into(group, found)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name].cpu()), f"{name} of step {step}"


class Copies(BaseHook):
    """Weights and optimizer state as they are when a step has ended, which is when it is saved."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, torch.Tensor]] = {}

    def on_after_step(self, trainer: BaseTrainer) -> None:
        copies = {name: param.detach().clone() for name, param in trainer.named_parameters().items()}
        for name, param in trainer.named_parameters().items():
            state = trainer._raw_optimizer.state[param]
            copies |= {f"{name}/{key}": value.clone() for key, value in state.items()}
        self.by_step[trainer.step] = copies


@on_each_device
def test_training_that_goes_on_never_gets_into_a_checkpoint(device: str, tmp_path: Path) -> None:
    """A save at every step, written while the next steps run: each checkpoint has the bits of its step."""
    copies = Copies()
    width = 512 if device == "cuda" else 32
    trainer = SmallTrainer(
        6,
        workspace=tmp_path,
        device=device,
        data_loader=lambda self: [(torch.randn(16, width),)],
        model_=lambda self: nn.Sequential(*(nn.Linear(width, width) for _ in range(8))),
        optimizer_=lambda self: torch.optim.AdamW(self.model.parameters(), lr=1e-2),
        hooks_=lambda self: [copies, CheckpointingHook(1, keep_previous=10, async_save=True)],
    )
    trainer.train()
    assert len(copies.by_step) == 6
    for step, expected in copies.by_step.items():
        _assert_holds(tmp_path / "checkpoints", step, expected, trainer.named_parameters().keys())


@pytest.mark.gpu
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_save_needs_no_device_memory(is_async: bool, tmp_path: Path, record_property: Any) -> None:
    """At most 2 % of the model's bytes beyond what is allocated already, at the first save and at a later one."""
    shares: list[float] = []

    class Peak(BaseHook):
        """Around the saves, which come after all hooks."""

        def on_after_step(self, trainer: BaseTrainer) -> None:
            synchronize("cuda")
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

        def on_before_step(self, trainer: BaseTrainer) -> None:
            if trainer.step > 1:
                shares.append((torch.cuda.max_memory_allocated() - self.before) / model_bytes)

    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(32)))
    model_bytes = sum(p.nbytes for p in model.parameters())
    SmallTrainer(
        5,
        workspace=tmp_path,
        data_loader=lambda self: [(torch.randn(4, 1024),)],
        model_=lambda self: model,
        optimizer_=lambda self: torch.optim.AdamW(self.model.parameters()),
        hooks_=lambda self: [Peak(), CheckpointingHook(2, async_save=is_async)],
    ).train()
    record_property("peak device memory of a save, share of the model", max(shares))
    assert len(shares) == 4
    assert max(shares) <= 0.02
