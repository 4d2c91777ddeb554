"""`deterministic=True` sets what torch needs, before it is too late, and holds the environment to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from .small import SmallTrainer

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def settings_are_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with torch's defaults and without the variables, and leaves no trace."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that its absence is restored as well
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def settings() -> tuple[bool, bool, bool, list[str | None]]:
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled()
    return algorithms, cudnn.deterministic, cudnn.benchmark, [os.environ.get(name) for name in VARIABLES]


def test_none_touches_nothing() -> None:
    """The default leaves torch and the environment as they are, also where a script has set them itself."""
    before = settings()
    SmallTrainer(1).train()
    assert settings() == before
    torch.use_deterministic_algorithms(True, warn_only=True)
    SmallTrainer(1).train()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_true_sets_what_torch_needs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Algorithms, cuDNN, cuBLAS and NCCL, from the making of the trainer on; a second trainer finds them set."""
    trainer = SmallTrainer(1, deterministic=True)
    expected = (True, True, False, [":4096:8", "Ring"])
    assert settings() == expected
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert "seed 0, deterministic, no checkpoints" in caplog.text
    SmallTrainer(1, deterministic=True)
    assert settings() == expected


def test_false_switches_it_off() -> None:
    """A trainer that asks for speed gets it, whatever the one before it had asked for."""
    SmallTrainer(1, deterministic=True)
    SmallTrainer(1, deterministic=False)
    assert settings()[:2] == (False, False)


def test_an_operation_that_has_no_deterministic_form_raises() -> None:
    """The run ends at it, rather than give other bits the next time."""
    index = torch.tensor([0, 0, 1])
    trainer = SmallTrainer(
        1,
        deterministic=True,
        model_=lambda self: nn.Linear(3, 3),
        forward_=lambda self, batch: (torch.zeros(2).put(index, self.model(batch[0])[0]).sum(), {}),
    )
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        trainer.train()


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS")])
def test_a_variable_that_contradicts_it_is_an_error(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the variable, its value and what it must be; nothing was set."""
    before = settings()[:3]
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"`deterministic=True` needs `{name}` to be one of .*, but .* '{value}'"):
        SmallTrainer(1, deterministic=True)
    assert settings()[:3] == before


@pytest.mark.parametrize("value", [":16:8", ":4096:8"])
def test_a_variable_that_agrees_stays(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launch has chosen among the sound values is kept."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    SmallTrainer(1, deterministic=True)
    assert settings()[3] == [value, "Tree"]


def test_it_is_too_late_once_cuda_or_nccl_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have read their variables already: the error says where to set them. Set in time, they are fine."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(
        ValueError, match=r"too late: CUDA has already started .* Set `CUBLAS_WORKSPACE_CONFIG=:4096:8`"
    ):
        SmallTrainer(1, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with monkeypatch.context() as started:
        started.setattr(dist, "is_initialized", lambda: True)
        started.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
        with pytest.raises(ValueError, match=r"too late: NCCL has already started .* Set `NCCL_ALGO=Ring`"):
            SmallTrainer(1, deterministic=True)
    SmallTrainer(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("value", [1, "yes"])
def test_anything_else_is_an_error(value: object) -> None:
    """1 is not True."""
    with pytest.raises(TypeError, match="`deterministic` must be True, False or None"):
        SmallTrainer(1, deterministic=value)
