"""Checks that the ranks still train the same model. A checksum of numbers that must be equal travels with each window.

DDP reduces only the gradients of parameters that went through its `forward`. If a part of the model is trained outside
of it, or one rank changes a learning rate, the weights of the ranks drift apart, and nothing fails. The gradient norm
shows the drift, because every rank computes it from its own copy.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data.per_rank import SHARD_REMEDY
from ..errors import RankDisagreementError
from ..ranks import collectives

if TYPE_CHECKING:
    from ..data.feed import DataFeed
    from ..trainer import BaseTrainer

_NUM_SHOWN = 4  # ranks or parameters that an error names
_ADVICE = {
    "gradient norm": (
        "Look for a part of the model that `forward` does not call through `self.model` (DDP does not reduce its"
        " gradients), for parameters whose `requires_grad` has changed since the model was built, and for a hook that"
        " changes weights or gradients on some ranks only."
    ),
    "loss scale": "Look for a `build_grad_scaler` that depends on the rank.",
    "learning rates": "Look for a hook or a schedule that sets them on some ranks only, or from numbers of one rank.",
    "order of the data": (
        "The ranks read the data in different orders, or read other data, so some samples would be seen twice and"
        f" others never. {SHARD_REMEDY}"
    ),
    "data position": "Look for data that has another length or order on some ranks.",
    "step": "Look for a hook that loads a state on some ranks only.",
}


class Agreement:
    """Checks the numbers that must be the same on every rank: step, order and position of the data, gradient norm, loss
    scale and learning rates.

    Costs one CRC over a few dozen bytes per window, and no communication of its own.

    Args:
        trainer: The trainer. It must be built.
        feed: The source of the batches.
    """

    def __init__(self, trainer: BaseTrainer, feed: DataFeed) -> None:
        self._trainer, self._feed = trainer, feed
        self._optimizer = trainer._raw_optimizer
        self._is_alone = collectives.world_size() == 1
        self._norm = self._scale = 0.0

    def readable(self, norm: torch.Tensor) -> torch.Tensor:
        """The tensor that the host reads in one sync: the gradient norm, and the loss scale if there is one."""
        if self._trainer.grad_scaler is None:
            return norm
        # `get_scale` would be a sync of its own. Under FSDP2 the norm alone doesn't show that the scales differ.
        scale: Any = self._trainer.grad_scaler._scale
        return torch.stack((norm, scale.to(norm)))

    def read_norm(self, readable: torch.Tensor) -> float:
        """Read what `readable` returned, and return the gradient norm. One sync, unless it is on the host already."""
        value: float
        if readable.dim() == 0:
            value = readable.item()
        else:
            value, self._scale = readable.tolist()
        self._norm = value if value == value else math.nan  # all NaNs become the same bits
        return value

    def checksum(self) -> int:
        """Checksum for the control message; 0 in a single process. Reads nothing from the device."""
        if self._is_alone:
            return 0
        rates = self._learning_rates()
        numbers = struct.pack(
            f"4q{len(rates) + 2}d", *self._position(), self._feed.checksum, self._norm, self._scale, *rates
        )
        return zlib.crc32(numbers)

    def check(self) -> None:
        """Compare the checksums now, after the last window of a run. Call on every rank."""
        if not collectives.is_same_on_ranks(self.checksum()):
            self.explain()

    def explain(self) -> None:
        """Find out which numbers differ, and raise. Call on every rank.

        Raises:
            RankDisagreementError: On every rank. The message names the quantity, its values by rank, and the first
                parameters whose weights or gradients differ from rank 0's.
        """
        step, epoch, position = self._position()
        own = {
            "order of the data": self._feed.checksum,
            "gradient norm": self._norm,
            "loss scale": self._scale,
            "learning rates": self._learning_rates(),
            "data position": (epoch, position),
            "step": step,
        }
        by_rank = collectives.gather_objects(own)
        texts = {name: [repr(values[name]) for values in by_rank] for name in own}
        differing = {name: _by_value(values) for name, values in texts.items() if len(set(values)) > 1}
        tensors = collectives.gather_objects(self._differing_from_rank_zero())
        found = [
            f" {kind} differ from rank 0's in {_by_rank([names[kind] for names in tensors])}."
            for kind in ("Weights", "Gradients")
            if any(names[kind] for names in tensors)
        ]
        quantities = " and the ".join(f"{name} ({values})" for name, values in differing.items())
        raise RankDisagreementError(
            f"Step {step}: the ranks do not agree on the {quantities}, so they would no longer train the same"
            f" model.{''.join(found)} {_ADVICE[next(iter(differing))]}"
        )

    def _position(self) -> tuple[int, int, int]:
        return (self._trainer.step, *self._feed.position)

    def _learning_rates(self) -> list[float]:
        rates = [group.get("lr", 0.0) for group in self._optimizer.param_groups]
        # Reading a rate that is a tensor on an accelerator would be a sync.
        return [0.0 if isinstance(rate, torch.Tensor) and rate.device.type != "cpu" else float(rate) for rate in rates]

    @torch.no_grad()
    def _differing_from_rank_zero(self) -> Mapping[str, list[str]]:
        """Names of replicated parameters whose weights or gradients differ from rank 0's. Call on every rank. FSDP2's
        shards always differ, so they are left out.
        """
        own = {
            name: (collectives.checksum(param), None if param.grad is None else collectives.checksum(param.grad))
            for name, param in self._trainer.named_parameters().items()
            if not hasattr(param, "device_mesh")
        }
        first = collectives.broadcast_object(own)
        return {
            kind: [name for name, sums in own.items() if name not in first or sums[i] != first[name][i]]
            for i, kind in enumerate(("Weights", "Gradients"))
        }


def _by_value(values: Sequence[str]) -> str:
    """For example: rank 0: 1.5; ranks 1, 2: 1.25."""
    parts = []
    for value in dict.fromkeys(values):
        ranks = [rank for rank, other in enumerate(values) if other == value]
        parts.append(f"{_ranks(ranks)}: {value}")
    return "; ".join(parts[:_NUM_SHOWN]) + ("; …" if len(parts) > _NUM_SHOWN else "")


def _by_rank(names_by_rank: Sequence[Sequence[str]]) -> str:
    """For example: 2 parameters: a.weight, a.bias (rank 1)."""
    texts = [
        f"{len(names)} parameters: {', '.join(names[:_NUM_SHOWN])}{', …' if len(names) > _NUM_SHOWN else ''}"
        for names in names_by_rank
    ]
    groups = {text: [rank for rank, other in enumerate(texts) if other == text] for text in dict.fromkeys(texts)}
    shown = [f"{text} ({_ranks(ranks)})" for text, ranks in groups.items() if names_by_rank[ranks[0]]]
    return "; ".join(shown[:_NUM_SHOWN]) + ("; …" if len(shown) > _NUM_SHOWN else "")


def _ranks(ranks: Sequence[int]) -> str:
    more = ", …" if len(ranks) > _NUM_SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_NUM_SHOWN]))}{more}"
