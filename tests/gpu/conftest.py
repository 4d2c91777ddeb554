"""A test marked `gpu` is skipped where torch sees no GPU, and leaves torch's process-wide settings as it found them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")
        gc.collect()
        torch.cuda.empty_cache()
