"""DDP sums the gradients in the same order in every life of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from trainloop.testing import KillAt, assert_resume_exact

from .workers.buckets import make_trainer


@pytest.mark.parametrize(
    ("model", "num_processes", "accumulation"),
    [("mlp", 3, 1), ("mlp", 4, 3), ("several buckets", 3, 3), ("crossed", 4, 1)],
)
def test_a_resume_is_exact_with_more_than_two_processes(
    tmp_path: Path, model: str, num_processes: int, accumulation: int
) -> None:
    """Killed after 13 of 20 steps: with 3 and 4 processes the run ends bit for bit as one that was not killed."""
    assert_resume_exact(
        partial(make_trainer, model=model, accumulation=accumulation),
        [KillAt(14, "on_before_step", 1)],
        num_processes=num_processes,
        workspace=tmp_path,
    )
