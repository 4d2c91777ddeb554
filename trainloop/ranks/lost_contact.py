"""Whether an exception is this rank's own, or what it sees of the end of another."""

from __future__ import annotations

import re

import torch.distributed as dist

from ..errors import TrainingError

_GLOO = re.compile(r"\[\S+\.(cc|h):\d+\]")
"""How gloo begins its errors, which are plain RuntimeErrors; a script may raise one with the same words."""
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
)


def is_lost_contact(exception: BaseException | None) -> bool:
    """Whether a collective failed because another rank is gone or did not come in time."""
    while exception is not None:
        text = str(exception)
        is_gloo = type(exception) is RuntimeError and _GLOO.search(text) is not None
        is_ours = is_gloo and any(lost in text for lost in _LOST)
        if is_ours or (dist.is_available() and isinstance(exception, dist.DistError)):
            return True
        exception = exception.__cause__
    return False


def is_consequence(exception: BaseException) -> bool:
    """Whether another rank failed first, as far as this one can know."""
    told = isinstance(exception, TrainingError) and exception.is_consequence
    return told or is_lost_contact(exception)
