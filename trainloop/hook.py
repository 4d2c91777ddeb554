"""One method for each event of a run. Subclass `BaseHook` and override the methods that you need."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import TrainloopWarning, describe
from .ranks import collectives
from .records import ShownRecords

if TYPE_CHECKING:
    from pathlib import Path

    from .records import Records
    from .trainer import BaseTrainer


class BaseHook:
    """Base of all hooks. Each method is one event of the run, and by default does nothing.

    Hooks are called in list order, on every rank, at the same points. An event that runs on every rank may therefore
    use collectives; don't guard a collective with a rank check. The order of the hooks never changes a result:
    checkpoints are taken after every hook's `on_after_step`, averages are updated after every hook's
    `on_after_optimizer_step`, and each hook gets its own state back right after its `on_before_train`. `trainer` is
    the same `BaseTrainer` at every event.

    Example:
        ```python
        class StopWhenGood(BaseHook):
            def on_after_step(self, trainer):
                if trainer.step % 100 == 0 and trainer.step_info.loss.item() < 0.01:
                    trainer.request_stop()
        ```
    """

    def on_before_train(self, trainer: BaseTrainer) -> None:
        """The run is built and prepared. If it resumes, its training state is restored. No batch has been drawn yet.
        Every rank; collectives allowed.
        """

    def on_before_step(self, trainer: BaseTrainer) -> None:
        """An optimizer step begins. `trainer.step` is its number; `trainer.step_info` is new and empty. Every rank;
        collectives allowed.
        """

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        """The window's gradient is complete, reduced, unscaled, finite and clipped; the update comes next. Every rank;
        collectives allowed. You may read gradients, and change them in the same way on every rank.

        On a GPU a run can be faster if no hook overrides this event: torch's fused optimizers skip a non-finite
        gradient on the device, so the host queues the update before it reads the norm.
        """

    def on_after_optimizer_step(self, trainer: BaseTrainer) -> None:
        """The update has just been applied; no hook has received `on_after_step` yet. Every rank; collectives allowed.
        You may read weights, and constrain them in the same way on every rank. `EmaHook` averages the weights after
        this event of all hooks.
        """

    def on_after_step(self, trainer: BaseTrainer) -> None:
        """The update is applied and the learning rate has moved. Not called for a discarded window. Every rank;
        collectives allowed. You may read weights, but not change them.
        """

    def on_after_train(self, trainer: BaseTrainer) -> None:
        """The run has reached its limit, or the ranks agreed on a stop. Not called after an exception. Every rank;
        collectives allowed.
        """

    def on_log(self, trainer: BaseTrainer, records: Records, dry_run: bool) -> None:
        """`trainer.log` was called. Fires only on the ranks that called it.

        Args:
            trainer: The trainer.
            records: Nested mapping of numbers.
            dry_run: Only say what would be written.
        """

    def on_log_images(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        """`trainer.log_images` was called. Fires only on the ranks that called it.

        Args:
            trainer: The trainer.
            records: Nested mapping of images: Pillow's, tensors or numpy arrays.
            dry_run: Only say what would be written.
        """

    def on_log_histogram(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        """`trainer.log_histogram` was called, on the ranks that called it.

        Args:
            trainer: The trainer.
            records: Nested mapping of tensors or numpy arrays, of any shape.
            dry_run: Say what would be written, and write nothing.
        """

    def on_log_text(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        """`trainer.log_text` was called, on the ranks that called it.

        Args:
            trainer: The trainer.
            records: Nested mapping of strings.
            dry_run: Say what would be written, and write nothing.
        """

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        """`trainer.state_dict` collects the state of the run. Add yours, under a key of your own. Every rank;
        collectives allowed.

        Values are nested dicts and lists of numbers, strings, `None` and tensors. A DTensor comes back sharded at any
        number of processes, or whole if the model of that run is not sharded. If a value differs between ranks, each
        rank gets its own back. At another number of processes every rank gets that of rank 0, and the log says so.

        Args:
            trainer: The trainer.
            state_dict: The state collected so far. Change it in place.
        """

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        """A saved state is loaded. Take yours from the key that you used in `on_state_dict`. On a resume this event
        comes right after this hook's `on_before_train`. Every rank; collectives allowed.

        Args:
            trainer: The trainer.
            state_dict: The whole state, of all hooks. It has no `"rank"` if another number of processes saved it.
        """

    def on_non_finite_grad(self, trainer: BaseTrainer, retry: int) -> None:
        """A window was discarded because its gradient was not finite. Weights, optimizer, buffers and learning rate
        are as they were before the window. Every rank; collectives allowed.

        Args:
            trainer: The trainer.
            retry: How many windows of this step have been discarded, including this one.
        """

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        """An exception is about to leave `train`, perhaps on this rank only. Don't use collectives here.

        Args:
            trainer: The trainer.
            exception: The exception. This includes `SystemExit` and `KeyboardInterrupt`.
        """


EVENTS = [name for name in vars(BaseHook) if name.startswith("on_")]
"""The names of all events."""


class CheckpointerHook(BaseHook):
    """A hook that saves and restores the run. The trainer calls `restore` and `save_if_due` at fixed points, so that
    the hook's position in the list doesn't matter.
    """

    trainable_only: bool = False
    """Whether checkpoints leave out frozen parameters that still have the values that `build_model` gave them."""

    def saves_to(self, trainer: BaseTrainer) -> Path | None:
        """The folder that this hook saves into, for the report at the start. None: it saves nothing."""
        return None

    def restore(self, trainer: BaseTrainer) -> dict[str, Any] | None:
        """Load the training state into `trainer`, if there is one, before any hook's `on_before_train`. Every rank.

        Returns:
            The state for the hooks' `on_load_state_dict`. None: the run starts fresh.
        """
        return None

    def save_if_due(self, trainer: BaseTrainer) -> None:
        """Save if a checkpoint is due, after every hook's `on_after_step`. Every rank; collectives allowed."""

    def note_losses(self, first_step: int, losses: Sequence[float]) -> None:
        """The losses of consecutive steps were read from the device, for the log. Every rank.

        Args:
            first_step: Number of the first of these steps.
            losses: This rank's share of the loss of each step.
        """


class AveragingHook(BaseHook):
    """A hook that averages the weights. The trainer calls `update_average` at a fixed point, so that the hook's
    position in the list doesn't matter.
    """

    def update_average(self, trainer: BaseTrainer) -> None:
        """Add the new weights to the average, after every hook's `on_after_optimizer_step`. Every rank; collectives
        allowed. Must not change the weights.
        """

    def follow_trainable(self, trainer: BaseTrainer) -> None:
        """Called when other parameters are trained from the next window on. Every rank, before that window."""


_WRITERS = {
    "log": "MetricsFileHook, WandbHook, TrackerHook",
    "log_images": "ImageFileLoggerHook, WandbHook, TrackerHook",
    "log_histogram": "MetricsFileHook, WandbHook, TrackerHook",
    "log_text": "MetricsFileHook, WandbHook, TrackerHook",
}


def listeners(trainer: BaseTrainer, method: str, records: Any) -> Sequence[BaseHook]:
    """All hooks of the run. They receive `records` from `trainer.log` or `trainer.log_images`.

    Warns once per method if no hook shows its records. A checkpointer doesn't count: it only keeps numbers as metrics
    of the next checkpoint.

    Args:
        trainer: The trainer.
        method: "log" or "log_images".
        records: The argument of that method.

    Raises:
        TypeError: `records` is not a mapping.
    """
    if not isinstance(records, Mapping):
        raise TypeError(
            f'`{method}` must be given a mapping, for example `trainer.{method}({{"name": value}})`, but was given'
            f" {describe(records)}."
        )
    event = f"on_{method}"
    others = [hook for hook in trainer.hooks if not isinstance(hook, CheckpointerHook)]
    is_shown = isinstance(records, ShownRecords) or any(overrides(hook, event) for hook in others)
    if not is_shown and method not in trainer._unheard:
        trainer._unheard.add(method)
        why = f"no hook defines `{event}`" if trainer._is_built else "the hooks don't exist before `train` begins"
        if collectives.rank() == 0:
            text = f"The records given to `trainer.{method}` are not written anywhere, because {why}."
            remedy = (
                f" Return one from `build_hooks`: {_WRITERS[method]}, or one of your own." if trainer._is_built else ""
            )
            warnings.warn(text + remedy, TrainloopWarning, stacklevel=3)  # points at the caller of `log`
    return trainer.hooks


def progress(trainer: BaseTrainer) -> str:
    """The position of the run for a log line: "step 10/100", or "step 10/100 | epoch 1/3"."""
    step = f"step {trainer.step}" + (f"/{trainer.max_steps}" if trainer.max_steps is not None else "")
    return step if trainer.max_epochs is None else f"{step} | epoch {trainer.epoch}/{trainer.max_epochs}"


def overrides(hook: BaseHook, event: str) -> bool:
    """Whether a hook overrides an event."""
    return getattr(getattr(hook, event), "__func__", None) is not getattr(BaseHook, event)
