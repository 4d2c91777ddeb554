"""One no-op method for each event of a run. Subclass `BaseHook` and override what you need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .records import Records
    from .trainer import BaseTrainer


class BaseHook:
    """Base of all hooks: each method is one event of the run, and does nothing.

    Hooks are called in list order, on every rank, in the same places, so an event that runs on all ranks may use
    collectives; do not guard a collective with a rank check. The order of the hooks never changes a result: a
    checkpoint is taken after every hook's `on_after_step`, and a hook gets its own state back right after its
    `on_before_train`. `trainer` is the run's `BaseTrainer`, the same at every event.

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
        """The update was just applied, and no hook has heard `on_after_step` yet: the place for what every other hook
        must find done, as an average of the weights. Every rank; collectives allowed; weights may be read and, alike on
        every rank, constrained.
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
        allowed. Values are nested dicts and lists of numbers, strings, `None` and tensors (sharded ones included).

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


class CheckpointerHook(BaseHook):
    """A hook that saves the run and brings it back. The trainer asks for both in places of their own, so that no other
    hook's position in the list matters.
    """

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
