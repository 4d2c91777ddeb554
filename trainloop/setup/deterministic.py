"""The settings of `deterministic=True`, with which equal inputs give equal bits. Set before CUDA and NCCL start."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..errors import describe

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUES = (":4096:8", ":16:8")  # the two values with which cuBLAS promises the same bits
_NCCL = "NCCL_ALGO"
_NCCL_VALUES = (
    "Ring",
    "Tree",
    "CollnetDirect",
    "CollnetChain",
    "^NVLS",
)  # each sums in a fixed order; the same list as Megatron's


def choose_determinism(deterministic: bool | None) -> None:
    """Set the process-wide settings for the argument `deterministic`. Call before the `Accelerator` is built.

    Args:
        deterministic: True: torch's and cuDNN's deterministic algorithms, and the environment variables that cuBLAS and
            NCCL need. False: torch and cuDNN choose freely. None: change nothing.

    Raises:
        TypeError: `deterministic` is not one of these.
        ValueError: An environment variable contradicts it, or CUDA or NCCL has already started without it.
    """
    if deterministic is None:
        return
    if not isinstance(deterministic, bool):
        raise TypeError(f"`deterministic` must be True, False or None, but is {describe(deterministic)}.")
    if deterministic:
        _check_variable("CUDA", _CUBLAS, _CUBLAS_VALUES, torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        _check_variable("NCCL", _NCCL, _NCCL_VALUES, _nccl_has_started())
        os.environ.setdefault(_CUBLAS, _CUBLAS_VALUES[0])
        os.environ.setdefault(_NCCL, _NCCL_VALUES[0])
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def _check_variable(library: str, name: str, allowed: Sequence[str], has_started: bool) -> None:
    value = os.environ.get(name)
    if value is None and has_started:
        raise ValueError(
            f"`deterministic=True` comes too late: {library} has already started in this process without `{name}`. Set"
            f" `{name}={allowed[0]}` in the environment of `accelerate launch`, or make the trainer before anything"
            f" uses {library}."
        )
    if value is not None and value.lower() not in {text.lower() for text in allowed}:
        raise ValueError(
            f"`deterministic=True` needs `{name}` to be one of {', '.join(allowed)}, but the environment says"
            f" {value!r}. Unset it, or drop the argument."
        )


def _nccl_has_started() -> bool:
    return dist.is_available() and dist.is_initialized() and "nccl" in dist.get_backend().lower()
