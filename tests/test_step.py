"""A step is a step: learning rate, loss and gradient are those of a plain torch loop, in every form of launch."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from .launching import NUM_PROCESSES, REPOSITORY, command, environment, free_port, launch
from .workers import traces

TOLERANCE = 1e-6
WORKER = REPOSITORY / "tests" / "workers" / "traces.py"


def plain_loop(scenario: str) -> dict[str, Any]:
    """The same training in plain torch, one process, whole batches: nothing of ours but the data and the model."""
    _, kwargs = traces.SCENARIOS[scenario]
    num_micro = kwargs.get("gradient_accumulation_steps", 1)
    clip = kwargs.get("grad_clip", math.inf)
    is_weighted, skips = scenario.startswith("weighted"), scenario == "none_loss"
    x, y = traces.data()
    model = traces.make_model()
    optimizer = traces.make_optimizer(model)
    scheduler = traces.make_lr_scheduler(optimizer)
    draws = position = 0
    rows = []
    for _ in range(traces.STEPS):
        window = []
        while len(window) < num_micro:
            # The data sets of all epochs, one after the other: micro-batches straddle their ends.
            batch = [(position + i) % traces.NUM_SAMPLES for i in range(traces.BATCH)]
            position += traces.BATCH
            draws += 1
            if not (skips and draws % 3 == 0):
                window.append(batch)
        samples = [i for batch in window for i in batch]
        error = (model(x[samples]) - y[samples]).squeeze(1).pow(2)
        weight = traces.sample_weight(x[samples]) if is_weighted else torch.ones(len(samples), dtype=x.dtype)
        loss = (error * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        rows.append(
            {"loss": loss.item(), "norm": norm.item(), "lr": optimizer.param_groups[0]["lr"], "micro": num_micro}
        )
        optimizer.step()
        scheduler.step()
    return {"trace": rows, "parameters": {name: p.tolist() for name, p in model.named_parameters()}}


def assert_same_run(result: dict[str, Any], reference: dict[str, Any]) -> None:
    assert len(result["trace"]) == traces.STEPS
    for step, (row, wanted) in enumerate(zip(result["trace"], reference["trace"], strict=True), 1):
        assert row == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE), f"step {step}"
    assert result["parameters"].keys() == reference["parameters"].keys()
    for name, values in reference["parameters"].items():
        torch.testing.assert_close(
            torch.tensor(result["parameters"][name]), torch.tensor(values), rtol=TOLERANCE, atol=TOLERANCE, msg=name
        )


@pytest.fixture(scope="module", params=["single", "ddp2", "ddp3", "fsdp2"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """All scenarios in one launch of the form."""
    out = tmp_path_factory.mktemp(request.param)
    launch(WORKER, request.param, str(out), *traces.SCENARIOS)
    return request.param, out


@pytest.mark.parametrize("scenario", traces.SCENARIOS)
def test_every_form_of_launch_trains_as_a_plain_torch_loop(runs: tuple[str, Path], scenario: str) -> None:
    """Loss, norm, learning rate and the number of micro-batches of 20 steps, and the parameters after them, are those
    of the loop above on every rank: over five epoch ends, with windows and batches that straddle them.
    """
    form, out = runs
    reference = plain_loop(scenario)
    for rank in range(NUM_PROCESSES[form]):
        result = json.loads((out / f"{scenario}.{rank}.json").read_text())
        assert result["is_sharded"] == form.startswith("fsdp2")
        assert (result["model"] == "DistributedDataParallel") == form.startswith("ddp")
        assert_same_run(result, reference)


def test_two_nodes_train_as_one(tmp_path: Path) -> None:
    """Two launchers with one process each give the trace of a plain loop, as one launcher with two does."""
    port = str(free_port())
    nodes = []
    for rank in range(2):
        node = ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        launched = command(WORKER, "ddp2", [str(tmp_path), "accumulation"], [*node, "--main_process_port", port])
        nodes.append(
            subprocess.Popen(launched, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    for rank in range(2):
        assert_same_run(json.loads((tmp_path / f"accumulation.{rank}.json").read_text()), plain_loop("accumulation"))
