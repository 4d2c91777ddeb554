"""ProfilerHook writes snapshots of CUDA memory, on request and when memory runs out."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from trainloop import ProfilerHook

from ..small import SmallTrainer


@pytest.mark.gpu
def test_memory_that_runs_out_leaves_a_snapshot(tmp_path: Path) -> None:
    """Of a real allocation that is too large; the cycle before has written one too, and a table by device time."""

    def forward(self: Any, batch: Any) -> Any:
        if self.step == 5:
            torch.empty(2**50, device=self.device, dtype=torch.uint8)
        return self.model(batch[0]).pow(2).mean(), {}

    hook = ProfilerHook(1, 1, 2, memory_history=True)
    with pytest.raises(torch.OutOfMemoryError):
        SmallTrainer(6, workspace=tmp_path, hooks_=lambda self: [hook], forward_=forward).train()
    folder = tmp_path / "profiles"
    report = (folder / "out_of_memory_step_0000005_rank_00000.txt").read_text()
    assert "batch[0]: 2 x 3, float32" in report
    for file in (folder / "out_of_memory_step_0000005_rank_00000.pickle", folder / "step_0000004/rank_00000.pickle"):
        snapshot = pickle.loads(file.read_bytes())
        assert snapshot["segments"]
        assert any(snapshot["device_traces"])
    assert (folder / "step_0000004" / "rank_00000.txt").read_text()
