"""The devices that a test runs on: the CPU everywhere, and a GPU with `pytest -m gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

import pytest
import torch

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ON_GPU = {"ACCELERATE_USE_CPU": "false"}
"""Environment of a launch that uses the GPU; `launching.environment` asks for the CPU."""


def launch_variables(device: str) -> dict[str, str]:
    """What `launching.launch` needs in its environment to run on this device."""
    return ON_GPU if device == "cuda" else {}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@cache
def why_not_compiling(device: str) -> str | None:
    """Why `torch.compile` doesn't work here (it needs a C compiler, and Triton on a GPU); None: it works."""
    code = f"import torch; print(torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device={device!r})).sum().item())"
    done = _run([sys.executable, "-W", "ignore", "-c", code])
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120)
