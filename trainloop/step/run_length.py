"""The length of a run: a number of steps, a number of epochs, or whichever comes first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.feed import DataFeed
    from ..trainer import BaseTrainer


class RunLength:
    """Knows where a run ends, and converts epochs to steps if the data has a length.

    A run with `max_epochs` and without `max_steps` gets a computed `max_steps`: the number of steps for that many
    epochs. Schedules and progress bars use it. The run itself ends by the epoch, because the last step can move: after
    a discarded window, or with another number of micro-batches a step.

    Args:
        trainer: The trainer. Its data is built and at its beginning.
        feed: The source of the batches.
    """

    def __init__(self, trainer: BaseTrainer, feed: DataFeed) -> None:
        self._trainer, self._feed = trainer, feed
        self._batches_per_epoch = feed.num_batches_left(1)
        self._expected_steps: int | None = None
        self.stops_after: int | None = None
        """The last step of a dry run."""
        self.update(0)

    @property
    def max_steps(self) -> int | None:
        """The limit that the user has set. None: only the epochs decide."""
        trainer = self._trainer
        is_limit = trainer.max_epochs is None or trainer.max_steps != self._expected_steps
        return trainer.max_steps if is_limit else None

    @property
    def is_reached(self) -> bool:
        """Whether the run has taken all its steps or seen all its epochs."""
        trainer, max_steps = self._trainer, self.max_steps
        if any(limit is not None and trainer.step >= limit for limit in (max_steps, self.stops_after)):
            return True
        return trainer.max_epochs is not None and trainer.epoch >= trainer.max_epochs

    def update(self, num_done: int) -> None:
        """Compute the number of steps again, after `num_done` steps. Needed when the run was restored, when a window
        was discarded, and when the number of micro-batches a step has changed. Call on every rank.
        """
        trainer, num_micro_steps = self._trainer, self._trainer.gradient_accumulation_steps
        if self._batches_per_epoch is not None:
            trainer.steps_per_epoch = _ceil(self._batches_per_epoch, num_micro_steps)
        if trainer.max_epochs is not None and self.max_steps is None:
            num_left = self._feed.num_batches_left(trainer.max_epochs)
            self._expected_steps = None if num_left is None else num_done + _ceil(num_left, num_micro_steps)
            trainer.max_steps = self._expected_steps

    def is_raised(self, saved: Mapping[str, Any]) -> bool:
        """Whether a limit is higher than in the saved settings of a checkpoint."""
        return any(saved.get(name) is not None and limit > saved[name] for name, limit in self.limits.items())

    @property
    def limits(self) -> dict[str, int]:
        """The limits that the user has set, by argument."""
        limits = {"max_steps": self.max_steps, "max_epochs": self._trainer.max_epochs}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def names(self) -> str:
        """For example: `max_steps` and `max_epochs`."""
        return " and ".join(f"`{name}`" for name in self.limits)

    def __str__(self) -> str:
        """For example: `max_steps` is 100 and `max_epochs` is 3."""
        return " and ".join(f"`{name}` is {limit}" for name, limit in self.limits.items())


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
