"""Checkpoints that older versions of trainloop wrote: today's version resumes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from trainloop.checkpoint import Checkpoint

from .workers.checkpoint_store import bits, canonical, value
from .workers.old_run import CHECKPOINTS, EXPECTED, OldRun, digest, machine

DATA = Path(__file__).parent / "data"
SAMPLES = [DATA / "format_1", DATA / "format_2"]
"""Written by `tests/workers/old_run.py` with 0.1.0 before its modules moved into folders (commit b98a30e), and before
format 3 (commit 2294479).
"""
OF_RANKS = DATA / "format_2" / "hsdp2x2" / "step_0000007"
"""Written by four ranks of HSDP, with `tests/workers/checkpoint_store.py`, before format 3."""


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_an_older_versions_checkpoint_is_continued_as_that_version_did(tmp_path: Path, sample: Path) -> None:
    """Samples and learning rates are the same on every machine. Everything else has the same bits on a machine that
    computes as the one that wrote the sample; on others losses and norms are close.
    """
    expected = json.loads((sample / EXPECTED).read_text())
    shutil.copytree(sample / CHECKPOINTS, tmp_path / CHECKPOINTS)
    trainer, num_threads = OldRun(tmp_path), torch.get_num_threads()
    torch.set_num_threads(1)  # as when the sample was written: sums depend on it
    try:
        trainer.train()
    finally:
        torch.set_num_threads(num_threads)
    for row, old in zip(trainer.trace.rows, expected["rows"], strict=True):
        for name in ("step", "samples", "lr"):
            assert row[name] == old[name]
        for name in ("loss", "grad_norm"):
            assert float.fromhex(row[name]) == pytest.approx(float.fromhex(old[name]), rel=1e-4)
    if machine() == expected["machine"]:
        assert trainer.trace.rows == expected["rows"]
        assert digest(trainer) == expected["digest"]


def test_an_older_checkpoint_of_many_ranks_is_read_and_verified(tmp_path: Path) -> None:
    """Each tensor has its bits, whoever wrote its parts; a damaged file is found."""
    checkpoint = Checkpoint.open(OF_RANKS)
    assert checkpoint.find_problems() == []
    for group in ("model", "optim"):
        targets = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(group).items()}
        checkpoint.read_into(group, targets)
        for name, tensor in targets.items():
            assert bits(tensor) == bits(value(canonical(name), tensor)), name
    folder = shutil.copytree(OF_RANKS, tmp_path / OF_RANKS.name)
    path = folder / "optim" / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (problem,) = Checkpoint.open(folder).find_problems()
    assert "rank_00001.safetensors is damaged: its bytes are not those that were written" in problem
