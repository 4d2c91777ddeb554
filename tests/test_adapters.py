"""Adapters on a frozen model: what a checkpoint leaves out, and that a resume has all of it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainloop import CheckpointError, CheckpointingHook
from trainloop import Trainer as ReadyMade
from trainloop.checkpoint import Checkpoint
from trainloop.checkpoint.fingerprint import fingerprints
from trainloop.checkpoint.format.layout import manifest_texts, parse_manifest

from .launching import REPOSITORY, written_by_ranks
from .small import SmallTrainer
from .workers.adapters import STEPS, STOP, Trainer, run

WORKER = REPOSITORY / "tests" / "workers" / "adapters.py"
FROZEN = {"backbone.weight", "backbone.bias", "twin.weight", "twin.bias", "teacher.bias"}


@pytest.fixture(scope="module", params=["single", "ddp2", "fsdp2"])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a launch, and what each rank has written."""
    out: Path = tmp_path_factory.mktemp(request.param)
    return out, written_by_ranks(request.param, out, WORKER, run)


def checkpoint_of(out: Path, run: str, step: int) -> Checkpoint:
    return Checkpoint.open(out / run / "checkpoints" / f"step_{step:07d}")


def test_a_run_without_its_frozen_parameters_on_the_disk_resumes_exactly(launched: tuple[Path, list[Any]]) -> None:
    """Weights, optimizer, buffers and averages have the bits of the run that was not stopped. The teacher, which is
    frozen and moves, is in the checkpoints; the backbone is in none, nor in the average.
    """
    out, by_rank = launched
    for results in by_rank:
        assert results["small"] == results["whole"]
    for step in (STOP, STEPS):
        manifest = checkpoint_of(out, "small", step).manifest
        assert manifest.frozen.keys() == FROZEN
        assert manifest.tensors["model"].keys() == {"student.weight", "student.bias", "teacher.weight", "seen"}
        assert manifest.tensors["ema"].keys() == manifest.tensors["model"].keys()
        assert manifest.frozen["backbone.weight"].dtype == "bfloat16"
        assert manifest.frozen["backbone.weight"].shape == (33, 16)
    assert checkpoint_of(out, "whole", STEPS).manifest.frozen == {}


def test_a_resume_on_another_base_names_the_first_parameter_that_differs(launched: tuple[Path, list[Any]]) -> None:
    """On every rank alike, also by a hook that saves everything."""
    for results in launched[1]:
        told = results["other base"]
        assert " of 5 differ. The first is backbone.weight, which has other values here." in told
        assert told == launched[1][0]["other base"]


def test_weights_alone_are_loaded_onto_the_same_base_only(tmp_path: Path) -> None:
    """`load_weights`, as a resume, the average too."""
    Trainer(tmp_path, 2, trainable_only=True).train()
    checkpoint = tmp_path / "checkpoints" / "step_0000002"
    for ema in (None, "ema"):
        Trainer(tmp_path).load_weights(checkpoint, ema=ema)
        with pytest.raises(CheckpointError, match=r"The first is backbone\.weight, which has other values here"):
            Trainer(tmp_path, seed_of_base=2).load_weights(checkpoint, ema=ema)


def test_a_restart_may_train_what_was_frozen(tmp_path: Path) -> None:
    """And left out: the average of it begins with the weights that it had, and checkpoints hold it from then on."""

    class Thawed(Trainer):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.get_submodule("backbone").requires_grad_(True)
            return model

    Trainer(tmp_path, 2, trainable_only=True).train()
    trainer = Thawed(tmp_path, 3, trainable_only=True, on_resume=["optimizer"])
    trainer.train()
    before = checkpoint_of(tmp_path, "", 2).manifest
    after = checkpoint_of(tmp_path, "", 3).manifest
    assert before.frozen.keys() - after.frozen.keys() == {name for name in FROZEN if "teacher" not in name}
    assert "backbone.weight" in after.tensors["model"]
    average = trainer.state_dict()["ema"]["backbone.weight"]
    base = Trainer(tmp_path).build_model().get_parameter("backbone.weight").detach()
    trained = trainer.named_parameters()["backbone.weight"].detach()
    assert torch.equal(average, base.float().lerp(trained.float(), 0.5))
    assert not torch.equal(trained, base)


def test_a_base_that_build_model_has_not_given_is_saved(launched: tuple[Path, list[Any]]) -> None:
    """What the script has loaded into the model after it was built."""
    manifest = checkpoint_of(launched[0], "loaded", 1).manifest
    assert "backbone.bias" in manifest.tensors["model"]
    assert "backbone.bias" not in manifest.frozen
    assert "backbone.weight" in manifest.frozen


def test_one_process_goes_on_from_any_form(launched: tuple[Path, list[Any]]) -> None:
    """The fingerprints are those of the whole tensors, however these were cut."""
    out, by_rank = launched
    trainer = Trainer(out / "small", STEPS + 1, is_tied="fsdp2" not in out.name, trainable_only=True)
    trainer.train()
    assert trainer.step == STEPS + 1
    assert len(trainer.losses) == 1
    weight = trainer.named_parameters()["backbone.weight"].detach()
    assert fingerprints([weight]) == by_rank[0]["fingerprints"]
    first, second = (checkpoint_of(out, "small", step).manifest for step in (STEPS, STEPS + 1))
    assert first.frozen == second.frozen


def test_frozen_helpers_are_ready_and_beside_the_model(launched: tuple[Path, list[Any]]) -> None:
    """Each rank has rank 0's, in the dtype that was asked for, without gradients and in eval mode; sharded or not, the
    losses are the same, and nothing of the helpers is in the state.
    """
    out, by_rank = launched
    for results in by_rank:
        (losses, about, is_idle, num_tensors), sharded = results["helped"]
        kind, dtypes, total = about
        assert (kind, dtypes, is_idle) == ("Parameter", ["torch.bfloat16", "torch.float32"], True)
        assert total == by_rank[0]["helped"][0][1][2]
        assert sharded == [losses, ["DTensor" if "fsdp2" in out.name else kind, dtypes, total], is_idle, num_tensors]
        assert num_tensors == 9  # of `Model`


def test_a_frozen_helper_has_the_precision_of_the_launch() -> None:
    """One module, and bf16; the model is built as without it."""
    plain = SmallTrainer(1, mixed_precision="bf16")
    plain._build()
    helper = nn.Linear(3, 3)

    class Helped(SmallTrainer):
        def build_frozen(self) -> Any:
            torch.rand(7)  # draws
            return helper

    helped = Helped(1, mixed_precision="bf16")
    helped._build()
    assert helped.frozen is helper
    assert helper.weight.dtype == torch.bfloat16
    assert not helper.training
    assert plain.frozen is None
    assert torch.equal(helped.named_parameters()["weight"], plain.named_parameters()["weight"])


def test_the_trainer_of_ready_made_objects_takes_frozen_helpers() -> None:
    """Prepared in place, and under the name `frozen` of the trainer."""
    helper, model = nn.Linear(3, 3), nn.Linear(3, 1)
    trainer = ReadyMade(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=[torch.ones(2, 3)],
        forward=lambda model, batch: (model(helper(batch.bfloat16()).float()).pow(2).mean(), {}),
        frozen={"helper": helper},
        max_steps=1,
        mixed_precision="bf16",
    )
    trainer.train()
    assert trainer.frozen == {"helper": helper}
    assert helper.weight.dtype == torch.bfloat16
    assert (helper.training, helper.weight.requires_grad) == (False, False)


def test_a_helper_that_is_part_of_the_model_is_refused() -> None:
    """It would freeze the model; and what is no module."""

    class Shared(SmallTrainer):
        def build_frozen(self) -> Any:
            self.part = nn.Linear(3, 1)
            return self.part

        def build_model(self) -> Any:
            return nn.Sequential(self.part, nn.Linear(1, 1))

    with pytest.raises(ValueError, match=r"shares 2 parameters with `build_frozen`'s modules \(first: 0\.weight\)"):
        Shared()._build()

    class Wrong(SmallTrainer):
        def build_frozen(self) -> Any:
            return {"vae": "a path"}

    with pytest.raises(
        TypeError, match="`build_frozen` must return a module, a mapping from names to modules, or None"
    ):
        Wrong()._build()

    class OnMeta(SmallTrainer):
        def build_frozen(self) -> Any:
            return {"vae": nn.Linear(3, 3, device="meta")}

    with pytest.raises(ValueError, match=r"2 tensors of vae are on the meta device \(first: weight\)"):
        OnMeta(0).train()


def test_a_fingerprint_sees_every_bit_and_every_place() -> None:
    """One flipped bit, two elements that change places, a tensor that is doubled; for each size of an element."""
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64):
        tensor = torch.arange(1, 1 + 64 * 48).remainder(251).reshape(64, 48).to(dtype)
        flipped, swapped = tensor.clone(), tensor.clone()
        flipped[40, 7] += 1
        swapped[3, 4], swapped[5, 6] = tensor[5, 6], tensor[3, 4]
        different = [tensor, flipped, swapped, tensor * 2, tensor.T.contiguous(), tensor.flatten()[:-1]]
        assert len(set(fingerprints(different))) == len(different)
        assert fingerprints([tensor.T.contiguous().T]) == fingerprints([tensor])
    ones = torch.ones(2**12, 2**10)
    assert fingerprints([ones]) != fingerprints([ones * 2])


def test_a_manifest_that_leaves_out_what_it_has_is_refused(tmp_path: Path) -> None:
    """And one whose record is none."""
    trainer = Trainer(tmp_path, 1, trainable_only=True)
    trainer.train()
    manifest = Checkpoint.open(tmp_path / "checkpoints" / "step_0000001").manifest
    record = next(iter(manifest.frozen.values()))
    for frozen in (
        {"student.weight": record},
        {"a": replace(record, dtype="float99")},
        {"a": replace(record, shape=(-1,))},
    ):
        with pytest.raises(CheckpointError, match="damaged"):
            parse_manifest(*manifest_texts(replace(manifest, frozen=frozen)))


def test_trainable_only_must_be_a_flag() -> None:
    """An error at construction."""
    with pytest.raises(TypeError, match="`trainable_only` must be True or False, but is"):
        CheckpointingHook(1, trainable_only="yes")  # type: ignore[arg-type]
