"""One no-op method for each event of a run. Subclass `BaseHook` and override what you need."""

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
    """Base of all hooks: each method is one event of the run, and does nothing.

    Hooks are called in list order, on every rank, in the same places, so an event that runs on all ranks may use
    collectives; do not guard a collective with a rank check. The order of the hooks never changes a result: a
    checkpoint is taken after every hook's `on_after_step`, averages are updated after every hook's
    `on_after_optimizer_step`, and a hook gets its own state back right after its `on_before_train`. `trainer` is the
    run's `BaseTrainer`, the same at every event.

    Example:
        ```python
        class StopWhenGood(BaseHook):
            def on_after_step(self, trainer):
                if trainer.step % 100 == 0 and trainer.step_info.loss.item() < 0.01:
                    trainer.request_stop()
        ```
    """

    def on_before_train(self, trainer: BaseTrainer) -> None:
        """The run is built, prepared and (if it resumes) its training state is restored; the first batch is not
        drawn yet. Every rank; collectives allowed.
        """

    def on_before_step(self, trainer: BaseTrainer) -> None:
        """An optimizer step begins: `trainer.step` is its number, `trainer.step_info` is new and empty.
        Every rank; collectives allowed.
        """

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        """The window's gradient is complete, reduced, unscaled, finite and clipped; the update comes next. Every rank;
        collectives allowed. Gradients may be read and changed (alike on every rank).

        On a GPU a run whose hooks leave this event alone can be faster: torch's fused optimizers skip a non-finite
        gradient by themselves, so the host queues the update before it reads the norm. Override it only if you need it.
        """

    def on_after_optimizer_step(self, trainer: BaseTrainer) -> None:
        """The update was just applied, and no hook has heard `on_after_step` yet. Every rank; collectives allowed.
        Weights may be read. They may be constrained, in the same way on every rank. `EmaHook` averages them after all
        hooks' events.
        """

    def on_after_step(self, trainer: BaseTrainer) -> None:
        """The update was applied and the learning rate has moved on. Never called for a discarded window. Every rank;
        collectives allowed; weights may be read, and are not to be changed.
        """

    def on_after_train(self, trainer: BaseTrainer) -> None:
        """The run has reached `max_steps` or a stop was agreed. Not called after an exception. Every rank; collectives
        allowed.
        """

    def on_log(self, trainer: BaseTrainer, records: Records, dry_run: bool) -> None:
        """`trainer.log` was called, on the ranks that called it.

        Args:
            trainer: The trainer.
            records: Nested mapping of numbers.
            dry_run: Say what would be written, and write nothing.
        """

    def on_log_images(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        """`trainer.log_images` was called, on the ranks that called it.

        Args:
            trainer: The trainer.
            records: Nested mapping of images: Pillow's, tensors or numpy arrays.
            dry_run: Say what would be written, and write nothing.
        """

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        """`trainer.state_dict` gathers the state of the run: add yours under a key of your own. Every rank; collectives
        allowed. Values are nested dicts and lists of numbers, strings, `None` and tensors. A DTensor comes back sharded
        at any number of processes, and whole if the model is not sharded then. If the value of a key differs from rank
        to rank, each rank gets back its own. At another number of processes every rank gets that of rank 0, and the log
        says so.

        Args:
            trainer: The trainer.
            state_dict: What there is of it so far; it is changed in place.
        """

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        """A saved state is loaded: take yours from the key that `on_state_dict` put it under. On a resume this comes
        right after this hook's `on_before_train`. Every rank; collectives allowed.

        Args:
            trainer: The trainer.
            state_dict: The whole state, of all hooks; without `"rank"` if another number of processes saved it.
        """

    def on_non_finite_grad(self, trainer: BaseTrainer, retry: int) -> None:
        """A window was discarded because its gradient was not finite: weights, optimizer, buffers and learning rate
        are as they were before it. Every rank, alike; collectives allowed.

        Args:
            trainer: The trainer.
            retry: How many windows of this step have been discarded, this one included; starts at 1.
        """

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        """An exception is about to leave `train`. Perhaps on this rank only: no collectives here.

        Args:
            trainer: The trainer.
            exception: It; `SystemExit` and `KeyboardInterrupt` included.
        """


EVENTS = [name for name in vars(BaseHook) if name.startswith("on_")]
"""The names of all events."""


class CheckpointerHook(BaseHook):
    """A hook that saves the run and brings it back. The trainer asks for both in places of their own, so that no other
    hook's position in the list matters.
    """

    trainable_only: bool = False
    """Whether it leaves out the frozen parameters that are still as `build_model` gave them."""

    def saves_to(self, trainer: BaseTrainer) -> Path | None:
        """The folder that it saves into, for the report at the start."""
        return None

    def restore(self, trainer: BaseTrainer) -> dict[str, Any] | None:
        """Load the training state into `trainer`, if there is one, before any hook's `on_before_train`. Every rank.

        Returns:
            What the hooks' `on_load_state_dict` gets; `None`: the run starts fresh.
        """
        return None

    def save_if_due(self, trainer: BaseTrainer) -> None:
        """Save, if it is time to, after every hook's `on_after_step`. Every rank; collectives allowed."""

    def note_losses(self, first_step: int, losses: Sequence[float]) -> None:
        """The losses of steps in a row were read from the device, for the log. Every rank.

        Args:
            first_step: The first of the steps.
            losses: This rank's share of the loss of each step.
        """


class AveragingHook(BaseHook):
    """A hook that averages the weights. The trainer calls it in a place of its own, so that no other hook's position in
    the list matters.
    """

    def update_average(self, trainer: BaseTrainer) -> None:
        """Take the new weights into the average, after every hook's `on_after_optimizer_step`. Every rank; collectives
        allowed; weights are not to be changed.
        """


_WRITERS = {"log": "WandbHook, TrackerHook", "log_images": "ImageFileLoggerHook, WandbHook, TrackerHook"}


def listeners(trainer: BaseTrainer, method: str, records: Any) -> Sequence[BaseHook]:
    """All hooks of the run, which get `records` from `trainer.log` or `trainer.log_images`.

    Warns once for each of the two if no hook shows what it gets. A checkpointer doesn't count, since it only keeps
    numbers as metrics of the next checkpoint.

    Args:
        trainer: The trainer.
        method: "log" or "log_images".
        records: What the method was given.

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
            text = f"What `trainer.{method}` is given is not written anywhere, because {why}."
            remedy = (
                f" Return one from `build_hooks`: {_WRITERS[method]}, or one of your own." if trainer._is_built else ""
            )
            warnings.warn(text + remedy, TrainloopWarning, stacklevel=3)  # at who called `log`
    return trainer.hooks


def progress(trainer: BaseTrainer) -> str:
    """Where the run stands, for a line of the log: "step 10/100", or "step 10/100 | epoch 1/3"."""
    step = f"step {trainer.step}" + (f"/{trainer.max_steps}" if trainer.max_steps is not None else "")
    return step if trainer.max_epochs is None else f"{step} | epoch {trainer.epoch}/{trainer.max_epochs}"


def overrides(hook: BaseHook, event: str) -> bool:
    """Whether a hook does something at an event."""
    return getattr(getattr(hook, event), "__func__", None) is not getattr(BaseHook, event)
