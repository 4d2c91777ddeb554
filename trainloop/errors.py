"""Exceptions and warnings, and the classes that they derive from.

```
RuntimeError
└── TrainingError                 stops a run; every rank raises the same one
    ├── NonFiniteGradientError    the retries of one step are used up, or the parameters themselves are non-finite
    ├── RankDisagreementError     the ranks took different decisions where they must take the same one
    └── CheckpointError           a checkpoint could not be written, found or read
UserWarning
└── TrainloopWarning              base of all our warnings, so that one filter reaches them all
    ├── LossNoneWarning           `forward` returned no loss in a distributed run
    ├── DataReplayWarning         a resumed run must draw again the batches that it has already seen
    └── RedundantReadWarning      every rank reads all of the data, which takes time
```

For a wrong argument we raise a plain `ValueError` or `TypeError` that names the argument.
"""

from collections.abc import Iterable
from typing import Any


def describe(value: Any) -> str:
    """A short text for a wrong value, with its type, for an error message."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def check_int(name: str, value: Any, minimum: int, optional: bool = False) -> None:
    """Raise unless `value` is an integer of at least `minimum`, or None if `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer{' or None' if optional else ''}, but is {describe(value)}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, but is {value}.")


def check_interval(name: str, value: Any) -> None:
    """Raise unless `value` is a number of steps or "epoch"."""
    if isinstance(value, str) and value != "epoch":
        raise ValueError(f'`{name}` must be a number of steps or "epoch", but is {value!r}.')
    if value != "epoch":
        check_int(name, value, 1)


def check_initialised(instance: object, attributes: Iterable[str], base: str) -> None:
    """Raise if `instance` has none of the attributes that `__init__` of the class `base` sets."""
    if vars(instance).keys().isdisjoint(attributes):
        name = type(instance).__name__
        raise TypeError(f"`{name}.__init__` must call `super().__init__(...)`: {base} is not set up without it.")


class TrainingError(RuntimeError):
    """Something stopped the run. Every rank raises the same error.

    Attributes:
        is_consequence: Another rank failed first, and the message names it.
    """

    is_consequence = False


class NonFiniteGradientError(TrainingError):
    """The gradient stayed non-finite for more retries than `max_non_finite_grad_retries` allows. Or the parameters
    themselves are non-finite, so that no retry can help.
    """


class RankDisagreementError(TrainingError):
    """The ranks took different decisions where all of them must take the same one."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written, found or read."""


class TrainloopWarning(UserWarning):
    """Base of all warnings of trainloop."""


class LossNoneWarning(TrainloopWarning):
    """`forward` returned `None` for the loss in a distributed run. Every rank has to do so for the same micro-batch,
    without having called the wrapped model.
    """


class DataReplayWarning(TrainloopWarning):
    """The data cannot jump to a position, so a resumed run draws again the batches that it has already seen."""


class RedundantReadWarning(TrainloopWarning):
    """Every rank reads all samples of a stream but uses only a part of them. This takes more than 1 % of a step."""
