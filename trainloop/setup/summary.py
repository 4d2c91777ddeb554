"""A table of the model's parts: their parameters, how many of these are trained, and the bytes on a rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ranks import collectives
from ..step.non_finite import clean_name

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_DEPTH = 2


def model_summary(trainer: BaseTrainer) -> str:
    """The model as a table, two levels deep. Neighbours of the same kind and size share a row. Call on every rank."""
    model = trainer.unwrapped_model
    parts = [*_parts(model, "", _DEPTH), ("total", model)]
    by_rank = collectives.gather_objects([_local_bytes(part) for _, part in parts])
    sizes = [max(of_part) for of_part in zip(*by_rank, strict=True)]
    rows: list[tuple[str, str, str, str, str]] = []
    first, last, num_alike = "", "", 0
    for (name, part), size in zip(parts, sizes, strict=True):
        cells = (type(part).__name__.removeprefix("FSDP"), *_counts(part), _size(size))
        is_alike = bool(rows) and rows[-1][2:] == cells[1:] and rows[-1][1].split(" x ")[0] == cells[0]
        if is_alike and name != "total" and name.rpartition(".")[0] == last.rpartition(".")[0]:
            num_alike, last = num_alike + 1, name
            rows[-1] = (f"{first} … {last.rpartition('.')[2]}", f"{cells[0]} x {num_alike}", *cells[1:])
            continue
        first, last, num_alike = name, name, 1
        rows.append((name, *cells))
    table = [("module", "type", "parameters", "trainable", "a rank"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n  ".join(lines)


def _parts(module: nn.Module, prefix: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield clean_name(prefix + name), child
            if depth > 1 and isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                yield from _parts(child, f"{prefix}{name}.", depth - 1)


def _counts(module: nn.Module) -> tuple[str, str]:
    params = list(module.parameters())
    return f"{sum(p.numel() for p in params):,}", f"{sum(p.numel() for p in params if p.requires_grad):,}"


def _local_bytes(module: nn.Module) -> int:
    local = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
    return sum(p.numel() * p.element_size() for p in local if isinstance(p, torch.Tensor))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"
