"""Methods other than `forward`, called on `self.model`; for several ranks see test_agreement.py."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from .small import SmallTrainer


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.is_low: list[bool] = []

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        self.is_low.append(y.dtype == torch.bfloat16)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.encode(x))
        return y


class Named(Encoder):
    forward_methods = ("encode",)


def forward(self: Any, batch: Any) -> Any:
    encoded = self.model.encode(batch[0])
    assert encoded.dtype == torch.float32
    return self.model.head(encoded).pow(2).mean(), {}


def test_a_method_runs_in_the_launchs_precision() -> None:
    """As the model itself: in bf16 inside, fp32 outside. A copy of the model runs the copy's method."""
    trainer = SmallTrainer(2, model_=lambda self: Named(), forward_=forward, mixed_precision="bf16")
    trainer.train()
    model: Any = trainer.unwrapped_model
    assert model.is_low == [True, True]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.inner.weight.zero_()
        other.inner.bias.zero_()
    assert not other.encode(torch.ones(1, 3)).any()


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        ("encode", TypeError, "`forward_methods` must be a tuple of names, but is 'encode' (str)."),
        (("decode",), ValueError, "`forward_methods` names 'decode', but Encoder has no such method."),
    ],
)
def test_wrong_names_are_told(names: Any, kind: type[Exception], message: str) -> None:
    """Before the first step."""
    trainer = SmallTrainer(2, model_=lambda self: Encoder(), forward_=forward)
    trainer.forward_methods = names
    with pytest.raises(kind, match=re.escape(message)):
        trainer.train()
