"""Several ranks on one GPU, and one rank over NCCL, train as a plain torch loop does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..launching import environment, free_port, launch
from ..test_step import WORKER, assert_same_run, plain_loop
from ..workers import traces
from .devices import ON_GPU, launch_variables, on_each_device


@pytest.mark.gpu
def test_fsdp2_with_one_rank_over_nccl(tmp_path: Path) -> None:
    """Every scenario of the step: accumulation, clipping, weights, skipped micro-batches."""
    launch(WORKER, "fsdp1", str(tmp_path), *traces.SCENARIOS, env=ON_GPU, timeout=120)
    for scenario in traces.SCENARIOS:
        result = json.loads((tmp_path / f"{scenario}.0.json").read_text())
        assert result["is_sharded"]
        assert_same_run(result, plain_loop(scenario))


@on_each_device
def test_ddp_with_two_ranks_over_gloo(device: str, tmp_path: Path) -> None:
    """Both ranks use the same GPU, as two nodes with one process each would use theirs."""
    scenarios = list(traces.SCENARIOS) if device == "cuda" else ["accumulation"]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port()), "TRACES_BACKEND": "gloo", **launch_variables(device)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), *scenarios],
            env=environment(**place, RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    for scenario in scenarios:
        for rank in range(2):
            result = json.loads((tmp_path / f"{scenario}.{rank}.json").read_text())
            assert result["model"] == "DistributedDataParallel"
            assert_same_run(result, plain_loop(scenario))
