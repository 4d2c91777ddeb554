"""Histograms count every value once, exactly, whatever its dtype and range."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from trainloop import histograms
from trainloop.histograms import flatten_histograms, flatten_texts, to_histogram

VALUES = torch.randn(1000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "values",
    [VALUES, VALUES.double() * 1e300, VALUES.reshape(10, 100).T, VALUES.bfloat16(), (VALUES * 1e6).long(), VALUES > 0],
    ids=["float32", "huge", "transposed", "bfloat16", "int64", "bool"],
)
def test_the_counts_are_numpys(values: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same bins, but for values at a bin's edge; in one piece or in several; as an array as well."""
    found = to_histogram("x", values.requires_grad_() if values.is_floating_point() else values)
    plain = values.detach().double().numpy().reshape(-1)
    expected, edges = np.histogram(plain, np.array(found.edges))
    assert found.edges[0] == plain.min()
    assert found.edges[-1] == plain.max()
    assert len(edges) == 65
    assert sum(found.counts) == len(plain)
    assert np.abs(np.cumsum(found.counts) - np.cumsum(expected)).max() <= 40, "edges only"
    assert found.sum == pytest.approx(plain.sum(), rel=1e-12)
    if values.dtype != torch.bfloat16:
        assert to_histogram("x", values.detach().numpy()).counts == found.counts
    monkeypatch.setattr(histograms, "_CHUNK", 7)
    assert to_histogram("x", values).counts == found.counts


def test_what_is_not_finite_is_counted_apart() -> None:
    """One value, or none that is finite, has a histogram too."""
    odd = to_histogram("x", torch.tensor([math.nan, math.inf, 1.0, 2.0, -math.inf]))
    assert (odd.num_non_finite, sum(odd.counts), odd.sum, odd.sum_squares) == (3, 2, 3.0, 5.0)
    none = to_histogram("x", torch.tensor([math.nan]))
    assert (none.num_non_finite, none.counts) == (1, [0])
    same = to_histogram("x", torch.full((5,), 3))
    assert (same.edges[0], same.edges[-1], sum(same.counts)) == (2.5, 3.5, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: flatten_histograms([VALUES]),
            TypeError,
            "The records of `log_histogram` must be a mapping of tensors",
        ),  # type: ignore[arg-type]
        (lambda: flatten_histograms({"a": [1.5]}), TypeError, "`a/0` must be a tensor or a numpy array, but is 1.5"),
        (lambda: flatten_texts({"a": {3: "x"}}), TypeError, "The keys of strings must be strings, but `a` has 3"),  # type: ignore[dict-item]
        (lambda: flatten_texts({"a": {"b": 3}}), TypeError, "`a/b` must be a string, but is 3 (int)."),
        (
            lambda: to_histogram("x", torch.zeros(0, 3)),
            ValueError,
            "`x` must have at least one value, but has shape (0,",
        ),
        (lambda: to_histogram("x", torch.zeros(2) * 1j), TypeError, "`x` must be a dense tensor of real numbers"),
    ],
)
def test_what_is_no_histogram_or_text_is_told_by_its_name(call: Any, error: type[Exception], message: str) -> None:
    """With the key."""
    with pytest.raises(error, match=re.escape(message)):
        call()
