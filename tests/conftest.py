"""Each test starts as a process of its own would: Accelerate keeps its state for the whole process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
