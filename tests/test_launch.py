"""The same script runs under any `accelerate launch`, which is taken at its word."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .workers import gan

SCRIPTS = REPOSITORY / "tests" / "scripts"
TINY = """
from tests.small import SmallTrainer
import torch
from torch import nn
trainer = SmallTrainer(2, model_=lambda self: nn.Sequential(nn.Linear(3, 8), nn.{norm}(8), nn.Linear(8, 1)))
trainer.train()
a = trainer.accelerator
a.print("RESULT", a.num_processes, a.mixed_precision, trainer.gradient_accumulation_steps,
      any(hasattr(p, "device_mesh") for p in trainer.model.parameters()), type(trainer.model).__name__)
"""
PREPARED_EARLY = """
from accelerate import Accelerator
from torch import nn
from tests.small import SmallTrainer
theirs, ours = Accelerator(), Accelerator()
theirs.prepare(nn.Linear(3, 1))
try:
    SmallTrainer(2, accelerator=theirs)
except ValueError as ex:
    theirs.print("REFUSED", ex)
"""


def result(output: str) -> str:
    lines = re.findall(r"RESULT (.*)", output)
    assert lines, output[-3000:]
    return lines[0]


def tiny(tmp_path: Path, norm: str = "LayerNorm") -> Path:
    script = tmp_path / "train.py"
    script.write_text(TINY.format(norm=norm))
    return script


@pytest.mark.parametrize("form", ["single", pytest.param("ddp2", marks=pytest.mark.slow), "fsdp2"])
def test_a_users_image_classifier_learns(form: str) -> None:
    """BatchNorm, dict batches with strings, workers, augmentation, two parameter groups: over 85 % after 100 steps."""
    accuracy = re.fullmatch(r"accuracy=(.*)", result(launch(SCRIPTS / "image_classifier.py", form).stdout))
    assert accuracy is not None
    assert float(accuracy[1]) > 0.85


@pytest.mark.parametrize("form", ["single", pytest.param("ddp2", marks=pytest.mark.slow), "fsdp2"])
def test_a_users_language_model_learns(form: str) -> None:
    """A stream of padded windows, tied weights, token weights, accumulation: well below the letters' entropy of 3."""
    # Wrapping by size would try to shard the ModuleList itself.
    blocks = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Block"]
    loss = re.fullmatch(r"loss=(.*)", result(launch(SCRIPTS / "language_model.py", form, launch_args=blocks).stdout))
    assert loss is not None
    assert float(loss[1]) < 2.6


@pytest.mark.parametrize(
    ("form", "launch_args", "env", "wanted"),
    [
        ("single", ["--mixed_precision", "bf16"], {}, "1 bf16 1 False Sequential"),
        ("ddp2", [], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "2 no 3 False DistributedDataParallel"),
        ("ddp2", ["--mixed_precision", "bf16"], {}, "2 bf16 1 False DistributedDataParallel"),
        ("fsdp2", ["--mixed_precision", "bf16"], {}, "2 bf16 1 True FSDPSequential"),
        ("single", ["--dynamo_backend", "eager"], {}, "1 no 1 False OptimizedModule"),
    ],
)
def test_the_launch_configuration_is_honoured(
    tmp_path: Path, form: str, launch_args: list[str], env: dict[str, str], wanted: str
) -> None:
    """Processes, mixed precision, accumulation, wrapping and compilation are those of the launch."""
    assert result(launch(tiny(tmp_path), form, launch_args=launch_args, env=env).stdout) == wanted


def test_a_rehearsal_of_fsdp2_says_so_once(tmp_path: Path) -> None:
    """One warning, on rank 0; BatchNorm's buffers and `cpu_ram_efficient_loading` go together."""
    arguments = ["--fsdp_cpu_ram_efficient_loading", "true"]
    output = launch(tiny(tmp_path, "BatchNorm1d"), "fsdp2", launch_args=arguments).stdout
    assert result(output) == "2 no 1 True FSDPSequential"
    assert output.count("FSDP2 runs on CPU processes. Use this to test a launch configuration") == 1


def test_a_model_with_parameters_of_its_own_is_sharded_by_the_launch_s_defaults(tmp_path: Path) -> None:
    """With `cpu_ram_efficient_loading`, Accelerate failed on them: "not enough values to unpack"."""
    script = tiny(tmp_path)
    script.write_text(re.sub(r"nn\.Sequential\(.*\)\)\n", "nn.Linear(3, 1))\n", script.read_text()))
    arguments = ["--fsdp_cpu_ram_efficient_loading", "true"]
    assert result(launch(script, "fsdp2", launch_args=arguments).stdout) == "2 no 1 True FSDPLinear"


def test_fsdp1_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """It names the option."""
    done = launch(tiny(tmp_path), "fsdp2", launch_args=["--fsdp_version", "1"], check=False)
    assert done.returncode != 0
    assert "The launch configuration asks for FSDP version 1, which trainloop does not support." in done.stdout


def test_processes_that_are_each_alone_are_told(tmp_path: Path) -> None:
    """Two processes on a machine without a GPU, and nobody said CPU: an error instead of two runs."""
    done = launch(tiny(tmp_path), "ddp2", env={"ACCELERATE_USE_CPU": "false"}, check=False)
    assert done.returncode != 0
    assert "set `ACCELERATE_USE_CPU=true` before `accelerate launch`" in done.stdout


def test_an_accelerator_of_the_script_is_sharded_as_the_launch_says(tmp_path: Path) -> None:
    """FSDP2 on CPU processes, with `accelerator=` given: it trained under DDP without a word. If the script has
    already prepared a model, Accelerate has chosen DDP for it, and the error says so.
    """
    script = tiny(tmp_path)
    script.write_text(
        PREPARED_EARLY + script.read_text().replace("SmallTrainer(2,", "SmallTrainer(2, accelerator=ours,")
    )
    output = launch(script, "fsdp2").stdout
    assert result(output) == "2 no 1 True FSDPSequential"
    assert (
        "REFUSED The launch asks for FSDP2 on CPU processes, but the script's `Accelerator` has already prepared"
        in output
    )


def test_the_example_reaches_what_it_promises() -> None:
    """At least 97 % on held-out digits, as one process and as two."""
    for form in ("single", "ddp2"):
        output = launch(REPOSITORY / "examples" / "digits.py", form).stdout
        accuracy = re.search(r"accuracy on 360 held-out digits: (.*)%", output)
        assert accuracy is not None
        assert float(accuracy[1]) >= 97


def test_the_diffusion_example_draws_and_resumes(tmp_path: Path) -> None:
    """Started again, as FSDP2 after DDP, it goes on; at the end of each life there are evaluations of both weights, a
    picture of ten times ten samples that are not all alike, and a checkpoint that knows both losses.
    """
    for form, step, begin in (
        ("ddp2", 3, "The run starts at step 0."),
        ("fsdp2", 5, "The run continues after step 3."),
    ):
        arguments = ["--max-steps", str(step), "--workspace", str(tmp_path)]
        output = launch(REPOSITORY / "examples" / "diffusion.py", form, *arguments).stdout
        assert begin in output
        logged = re.findall(rf"step {step}/{step} \| (val\S*): loss (.*)", output)
        manifest = json.loads((tmp_path / "checkpoints" / f"step_{step:07d}" / "manifest.json").read_text())
        assert {name: f"{value:.4g}" for name, value in manifest["metrics"].items()} == {
            f"{prefix}/loss": loss for prefix, loss in logged
        }
        assert len(logged) == 2
        picture = np.asarray(Image.open(tmp_path / "images" / f"step_{step:07d}" / "samples.png"))
        assert picture.shape == (10 * 48 + 9 * 2,) * 2
        samples = {picture[i : i + 48, j : j + 48].tobytes() for i in range(0, 498, 50) for j in range(0, 498, 50)}
        assert len(samples) == 100


@pytest.mark.parametrize(
    "form", ["single", *(pytest.param(form, marks=pytest.mark.slow) for form in ("ddp2", "fsdp2"))]
)
def test_the_gan_example_is_killed_and_resumes(form: str, tmp_path: Path) -> None:
    """The steps that are done again have the losses of the first time, bit for bit, in both phases; each epoch's end
    has a checkpoint, the last one a picture. FSDP2 goes on where one process has ended.
    """
    worker = REPOSITORY / "tests" / "workers" / "gan.py"
    if form == "single":
        assert launch(worker, form, str(tmp_path), check=False).returncode != 0
        launch(worker, form, str(tmp_path))
    else:
        launch(worker, form, str(tmp_path), launch_args=["--max_restarts", "1"])
    for rank in range(NUM_PROCESSES[form]):
        rows = [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()]
        again = rows.index([gan.FIRST_END + 1, *rows[2 * gan.FIRST_END][1:]], 2 * gan.FIRST_END + 1)
        lives = [{(step, phase): loss for step, phase, loss in life} for life in (rows[:again], rows[again:])]
        in_both = lives[0].keys() & lives[1].keys()
        assert len(in_both) >= 2 * (gan.KILLED_AT - gan.FIRST_END - 1)
        assert all(lives[0][key] == lives[1][key] for key in in_both)
        assert max(lives[1])[0] == gan.LAST_STEP
    if form == "single":
        example, arguments = REPOSITORY / "examples" / "gan.py", ["--max-epochs", "3", "--workspace", str(tmp_path)]
        output = launch(example, "fsdp2", *arguments).stdout
        assert f"continues after step {gan.LAST_STEP}." in output
        assert "epoch 3/3" in output
    pictures = list((tmp_path / "images").glob("step_*/samples.png"))
    assert len(pictures) == (2 if form == "single" else 1)
    assert all(np.asarray(Image.open(picture)).std() > 0 for picture in pictures)


def test_the_language_model_example_trains_and_resumes_under_fsdp2(tmp_path: Path) -> None:
    """Its blocks are wrapped by their class; each life evaluates both weights, writes a text and saves; the second goes
    on where the first has ended.
    """
    blocks = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Block"]
    small = ["--width", "32", "--depth", "2", "--length", "32", "--batch-size", "4", "--accumulation", "2"]
    for step, begin in ((2, "The run starts at step 0."), (3, "The run continues after step 2.")):
        arguments = [*small, "--max-steps", str(step), "--interval", "2", "--workspace", str(tmp_path)]
        output = launch(REPOSITORY / "examples" / "language_model.py", "fsdp2", *arguments, launch_args=blocks).stdout
        assert begin in output
        assert f"step {step}/{step} | sample:" in output
        metrics = json.loads((tmp_path / "checkpoints" / f"step_{step:07d}" / "manifest.json").read_text())["metrics"]
        assert {"val/loss", "val_ema/loss"} <= metrics.keys()
        assert 5 < metrics["val/loss"] < 6  # about log(256), that of a model that knows nothing
