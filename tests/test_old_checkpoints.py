"""Checkpoints that older versions of trainloop wrote: today's version resumes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .workers.old_run import CHECKPOINTS, EXPECTED, OldRun, digest, machine

SAMPLE = Path(__file__).parent / "data" / "format_1"
"""Written by 0.1.0 before its modules moved into folders (commit b98a30e): `tests/workers/old_run.py`."""


def test_an_older_versions_checkpoint_is_continued_as_that_version_did(tmp_path: Path) -> None:
    """Samples and learning rates are the same on every machine. Everything else has the same bits on a machine that
    computes as the one that wrote the sample; on others losses and norms are close.
    """
    expected = json.loads((SAMPLE / EXPECTED).read_text())
    shutil.copytree(SAMPLE / CHECKPOINTS, tmp_path / CHECKPOINTS)
    trainer = OldRun(tmp_path)
    trainer.train()
    for row, old in zip(trainer.trace.rows, expected["rows"], strict=True):
        for name in ("step", "samples", "lr"):
            assert row[name] == old[name]
        for name in ("loss", "grad_norm"):
            assert float.fromhex(row[name]) == pytest.approx(float.fromhex(old[name]), rel=1e-4)
    if machine() == expected["machine"]:
        assert trainer.trace.rows == expected["rows"]
        assert digest(trainer) == expected["digest"]
