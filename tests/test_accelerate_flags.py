"""Flags of `accelerate launch` that change how the model runs give the same training, or are refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .launching import REPOSITORY, launch
from .small import SmallTrainer
from .workers.accelerate_flags import NUM_BLOCKS, STEPS

WORKER = REPOSITORY / "tests" / "workers" / "accelerate_flags.py"
BLOCKS = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Block"]
COMPILE = ["--dynamo_backend", "eager", "--dynamo_use_regional_compilation"]


def run(folder: Path, form: str, *flags: str) -> dict[str, Any]:
    out = folder / "result.json"
    wrapping = BLOCKS if form == "fsdp2" else []
    launch(WORKER, form, str(out), launch_args=[*wrapping, *flags])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """FSDP2 without any of the flags."""
    return run(tmp_path_factory.mktemp("plain"), "fsdp2")


def test_activation_checkpointing_draws_the_same_noise_again(plain: dict[str, Any], tmp_path: Path) -> None:
    """Each block runs twice, the second time with the dropout of the first: losses and weights are the same, to the
    bit. Accelerate asks torch not to restore the generators, which gives wrong gradients.
    """
    found = run(tmp_path, "fsdp2", "--fsdp_activation_checkpointing", "true")
    assert "FSDPCheckpointWrapper" in found["classes"]
    assert (plain["num_calls"], found["num_calls"]) == (STEPS * NUM_BLOCKS, 2 * STEPS * NUM_BLOCKS)
    assert found["losses"] == plain["losses"]
    assert found["weights"] == plain["weights"]


def test_parameters_offloaded_to_the_cpu_train_the_same(plain: dict[str, Any], tmp_path: Path) -> None:
    """On CPU processes they are there already: the launch configuration can be rehearsed."""
    found = run(tmp_path, "fsdp2", "--fsdp_offload_params", "true")
    assert (found["losses"], found["weights"]) == (plain["losses"], plain["weights"])


@pytest.mark.parametrize("form", ["single", "fsdp2"])
def test_regional_compilation_trains_the_same(form: str, plain: dict[str, Any], tmp_path: Path) -> None:
    """The blocks are compiled one by one, and the names of the weights stay clean."""
    expected = plain if form == "fsdp2" else run(tmp_path, form)
    found = run(tmp_path, form, *COMPILE)
    assert found["num_calls"] < expected["num_calls"]
    assert found["weights"].keys() == expected["weights"].keys()
    assert found["losses"] == pytest.approx(expected["losses"])


def test_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs libraries that trainloop is not tested with, whoever asks for it."""
    with pytest.raises(ValueError, match="trainloop does not support `mixed_precision` 'fp8' yet"):
        SmallTrainer(1, mixed_precision="fp8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="trainloop does not support `mixed_precision` 'fp8' yet"):
        SmallTrainer(1)
