"""Killed twice, resumed on the device: the same bits as a run that was never killed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from trainloop.testing import KillAt, assert_resume_exact

from ..workers.device_resume import make_trainer
from ..workers.resume import sample_ids
from .devices import on_each_device

KILLS = [KillAt(5, "forward", number=2), KillAt(8, "write", number=2)]


@on_each_device
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_deterministic_run_resumes_bit_for_bit(device: str, mixed_precision: str, tmp_path: Path) -> None:
    """Dropout and noise from the device's generator, BatchNorm, an average of the weights, a scattered sum, a pinned
    loader with workers, asynchronous saves: killed in mid-window and in mid-write, the run ends with the same bits.
    """
    make = partial(make_trainer, device=device, is_deterministic=True, scatters=True, mixed_precision=mixed_precision)
    assert_resume_exact(make, KILLS, record=sample_ids, workspace=tmp_path, timeout=120)


@pytest.mark.gpu
@pytest.mark.parametrize("scatters", [False, True], ids=["ordinary layers", "a scattered sum"])
def test_what_happens_without_deterministic_algorithms(
    scatters: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Measured and reported, never assumed: the run resumes, and the report says whether it ends with the same bits."""
    make = partial(make_trainer, device="cuda", is_deterministic=False, scatters=scatters)
    try:
        assert_resume_exact(make, KILLS, record=sample_ids, workspace=tmp_path, timeout=120)
        found = "the same bits"
    except AssertionError as ex:
        found = " ".join(str(ex).split())[:300]
    record_property("resumed without deterministic algorithms", found)
