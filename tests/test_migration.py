"""The pairs of examples/migration: a script with Accelerate by hand, the same on trainloop, and the same numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainloop.checkpoint import Checkpoint

from .launching import REPOSITORY, launch

WORKER = REPOSITORY / "tests" / "workers" / "migration.py"
EXAMPLES = REPOSITORY / "examples" / "migration"
BATCH_SIZES = {"vision": 32, "language_model": 8, "diffusion": 32, "checkpointing": 64}


def run(pair: str, which: str, out: Path, *arguments: str) -> list[str]:
    return [str(EXAMPLES / pair / f"{which}.py"), "--out", str(out), *arguments]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripts have left: `{pair}/{before,after}` of one process, `{pair}/{before,after}2` of two, and
    `{pair}/global` of one with the batches of two.
    """
    root = tmp_path_factory.mktemp("migration")
    single, ddp2 = [], []
    for pair, size in BATCH_SIZES.items():
        for which in ("before", "after"):
            single.append(run(pair, which, root / pair / which))
            ddp2.append(run(pair, which, root / pair / f"{which}2"))
        if pair != "diffusion":  # its noise is that of each process
            single.append(run(pair, "before", root / pair / "global", "--batch_size", str(2 * size)))
    folder = root / "checkpointing"
    for which in ("before", "after"):
        single.append(run("checkpointing", which, folder / f"{which}_killed", "--stop_at", "10"))
        single.append(run("checkpointing", which, folder / f"{which}_killed", "--resume", "latest"))
    saved, saved2 = str(folder / "before_at_16" / "step_16"), str(folder / "before2_at_8" / "step_8")
    single.append(run("checkpointing", "before", folder / "before_at_16", "--stop_at", "16"))
    single.append(run("checkpointing", "after", folder / "imported", "--resume", saved))
    ddp2.append(run("checkpointing", "before", folder / "before2_at_8", "--stop_at", "8"))
    ddp2.append(run("checkpointing", "after", folder / "imported2", "--resume", saved2))
    single += [[str(path)] for path in sorted(EXAMPLES.glob("from_*/after.py"))]
    launch(WORKER, "single", str(root), json.dumps(single))
    launch(WORKER, "ddp2", str(root), json.dumps(ddp2))
    return root


def trace(folder: Path, name: str = "loss") -> dict[int, Any]:
    """A number by step, as either script logs it; of a step that was done twice the second."""
    values = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        row = row.get("train", {}) | row.get("val", {}) | {"step": row["step"]} if set(row) & {"train", "val"} else row
        if name in row:
            values[row["step"]] = row[name]["0"] if isinstance(row[name], dict) else row[name]
    return values


@pytest.mark.parametrize("pair", BATCH_SIZES)
def test_one_process_sees_the_same_numbers(runs: Path, pair: str) -> None:
    """Loss and learning rate of every step; the learning rate to the bit."""
    before, after = runs / pair / "before", runs / pair / "after"
    assert len(trace(before)) >= 24
    assert trace(after) == pytest.approx(trace(before), rel=1e-6)
    assert trace(after, "lr") == trace(before, "lr")


@pytest.mark.parametrize("pair", ["vision", "language_model", "checkpointing"])
def test_two_processes_see_the_corrected_numbers(runs: Path, pair: str) -> None:
    """A prepared scheduler moves twice a step; the same script on trainloop has the learning rate and the loss of one
    process that takes batches of twice the size.
    """
    one, before, after = runs / pair / "global", runs / pair / "before2", runs / pair / "after2"
    steps = sorted(trace(one))
    assert sorted(trace(after)) == steps
    assert trace(after, "lr") == pytest.approx(trace(one, "lr"), rel=1e-12)
    assert trace(after) == pytest.approx(trace(one), rel=1e-5)
    old = trace(before, "lr")
    assert [old[step] for step in steps[2:6]] != pytest.approx(
        [trace(one, "lr")[step] for step in steps[2:6]], rel=0.01
    )


def test_where_nothing_was_wrong_two_processes_see_the_same_numbers(runs: Path) -> None:
    """The diffusion script has no scheduler: with each rank's noise its loss is the same as before."""
    assert trace(runs / "diffusion" / "after2") == pytest.approx(trace(runs / "diffusion" / "before2"), rel=1e-6)


def test_the_validation_is_the_same(runs: Path) -> None:
    """The vision script's accuracy after each epoch."""
    before = trace(runs / "vision" / "before", "accuracy")
    assert len(before) == 3
    assert trace(runs / "vision" / "after", "accuracy") == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("suffix", ["", "2"])
def test_the_average_and_its_samples_are_the_same(runs: Path, suffix: str) -> None:
    """The script's own average, and the grids that are sampled with it (to one level of 255)."""
    before, after = runs / "diffusion" / f"before{suffix}", runs / "diffusion" / f"after{suffix}"
    own = torch.load(before / "ema.pt", weights_only=True)["model"]
    checkpoint = Checkpoint.open(after / "checkpoints" / "step_0000040")
    saved = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors("ema").items()}
    checkpoint.read_into("ema", saved)
    assert own.keys() == saved.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6)
    for step in (20, 40):
        old = Image.open(before / "samples" / f"{step}.png")
        new = Image.open(after / "images" / f"step_{step:07d}" / "samples.png")
        for row, column in itertools.product(range(4), range(4)):  # ours has two pixels between the images
            x, y = 8 * column, 8 * row
            cells = (
                old.crop((x, y, x + 8, y + 8)),
                new.crop((x + 2 * column, y + 2 * row, x + 2 * column + 8, y + 2 * row + 8)),
            )
            assert max(abs(a - b) for a, b in zip(*(cell.tobytes() for cell in cells), strict=True)) <= 1


def test_a_killed_run_goes_on_as_before(runs: Path) -> None:
    """`load_state` with `skip_first_batches`, and `CheckpointingHook`: both end with the trace of a run that was not
    killed.
    """
    folder = runs / "checkpointing"
    for which in ("before", "after"):
        for name in ("loss", "lr"):
            assert trace(folder / f"{which}_killed", name) == trace(folder / which, name)


@pytest.mark.parametrize(("imported", "whole", "step"), [("imported", "before", 16), ("imported2", "global", 8)])
def test_the_checkpoints_that_one_has_are_gone_on_from(runs: Path, imported: str, whole: str, step: int) -> None:
    """From a `save_state` folder, at the end of an epoch, the run goes on with the numbers that were to come; saved by
    two processes, with the corrected learning rate.
    """
    folder = runs / "checkpointing"
    rest = {s: lr for s, lr in trace(folder / whole, "lr").items() if s > step}
    assert trace(folder / imported, "lr") == pytest.approx(rest, rel=1e-12)
    losses = {s: loss for s, loss in trace(folder / whole).items() if s > step}
    if imported == "imported":
        assert trace(folder / imported) == pytest.approx(losses, rel=1e-6)
    assert sorted(trace(folder / imported)) == sorted(losses)


@pytest.mark.parametrize("tool", ["lightning", "transformers", "pytorch_accelerated", "origin"])
def test_what_came_from_another_trainer_learns(runs: Path, tool: str) -> None:
    """The scripts that show the way from elsewhere run to their end, and get better."""
    checkpoints = sorted((runs / "runs" / tool / "checkpoints").glob("step_*"))
    infos = [Checkpoint.open(path).manifest for path in checkpoints]
    assert infos[-1].step == 220
    accuracy = [info.metrics["val/accuracy"] for info in infos if "val/accuracy" in info.metrics]
    assert tool == "origin" or accuracy[-1] > 0.85
