"""A checkpoint never mixes ranks: what they hold copies of is shown to be the same before it is split over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .launching import NUM_PROCESSES, REPOSITORY, launch

WORKER = REPOSITORY / "tests" / "workers" / "diverged.py"
EXPECTED = {
    "ddp3": {
        "weights": "model/a.weight (rank 1), model/b.weight (rank 2)",
        "optimizer": "optim/out.weight/exp_avg (rank 2)",
        "replica": "",
        "statistics": "",
    },
    "fsdp3": {"weights": "", "optimizer": "", "replica": "", "statistics": ""},
    "hsdp2x2": {
        "weights": "model/b.weight (rank 2), model/a.weight (rank 3)",
        "optimizer": "optim/out.weight/exp_avg (rank 2)",
        "replica": "model/b.weight (rank 3)",
        "statistics": "",
    },
}
"""What the error names; empty: it is saved. Under FSDP2 nobody holds a copy, under HSDP ranks 0 and 2, and 1 and 3."""


@pytest.mark.parametrize("form", EXPECTED)
def test_ranks_that_differ_by_one_bit_do_not_save(form: str, tmp_path: Path) -> None:
    """The save fails on every rank with the tensors and ranks that differ, and the checkpoint before it stays; each
    rank's own statistics of BatchNorm are no difference.
    """
    launch(WORKER, form, str(tmp_path))
    for rank in range(NUM_PROCESSES[form]):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for case, named in EXPECTED[form].items():
            error, steps = results[case]["error"], results[case]["steps"]
            assert steps == ([1] if named else [1, 2]), (case, error)
            if named:
                assert "The checkpoint of step 2 was not saved, earlier ones are untouched" in error
                assert "the ranks have diverged" in error
                assert f"holds them: {named}. " in error, error
            else:
                assert not error
