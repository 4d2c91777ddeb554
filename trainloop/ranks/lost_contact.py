"""Whether an exception is this rank's own, or a consequence of another rank's end."""

from __future__ import annotations

import re

import torch.distributed as dist

from ..errors import TrainingError
from .links import LostContactError

_GLOO = re.compile(r"\[\S+\.(cc|h):\d+\]")
"""The start of gloo's errors, which are plain RuntimeErrors. A script may raise one with the same words."""
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
)
_TIMED_OUT = ("Timed out waiting", "timeout", "timed out")


def is_lost_contact(exception: BaseException | None) -> bool:
    """Whether a collective failed because another rank is gone or did not come in time."""
    return _lost_contact(exception) is not None


def has_timed_out(exception: BaseException) -> bool:
    """Whether that collective has timed out, rather than lost a connection."""
    return any(words in str(_lost_contact(exception)) for words in _TIMED_OUT)


def _lost_contact(exception: BaseException | None) -> BaseException | None:
    """The first exception, among `exception` and its causes, from a collective in which other ranks are missing."""
    while exception is not None:
        text = str(exception)
        is_gloo = type(exception) is RuntimeError and _GLOO.search(text) is not None
        if is_gloo and any(lost in text for lost in _LOST):
            return exception
        if isinstance(exception, LostContactError):
            return exception
        if dist.is_available() and isinstance(exception, dist.DistError):
            return exception
        exception = exception.__cause__
    return None


def is_consequence(exception: BaseException) -> bool:
    """Whether another rank failed first, as far as this rank can know."""
    told = isinstance(exception, TrainingError) and exception.is_consequence
    return told or is_lost_contact(exception)
