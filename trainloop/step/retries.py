"""What happens after a window with a non-finite gradient: a new window, a lower loss scale, or an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import NonFiniteGradientError
from ..ranks.collectives import gather_objects
from .non_finite import NonFiniteReport, diagnose

if TYPE_CHECKING:
    from ..data.feed import DataFeed
    from ..trainer import BaseTrainer

_MAX_RETRIES_WITHOUT_EPOCHS = 100
_MIN_LOSS_SCALE = 2.0**-14  # 30 halvings of the initial 2^16; if the loss scale must be lower, the gradient is broken


class Retries:
    """Counts the discarded windows of a step, and raises when another try is pointless.

    Args:
        trainer: The trainer. It must be built.
        feed: The source of the batches.
    """

    def __init__(self, trainer: BaseTrainer, feed: DataFeed) -> None:
        self._trainer, self._feed = trainer, feed
        self._first_epoch = 0

    def count(self) -> bool:
        """Drop the gradient, then count and report a retry. Call on every rank, after the buffers are restored.

        Returns:
            Whether it counts as a retry. A window with a too high loss scale doesn't.

        Raises:
            NonFiniteGradientError: The parameters are not finite, the retries are used up, or a whole epoch gave no
                finite gradient.
        """
        trainer, info = self._trainer, self._trainer.step_info
        report = diagnose(trainer.unwrapped_model, info.losses, trainer._built_model.non_finite)
        trainer._gradients.drop()
        trainer._length.update(trainer.step - 1)
        if report.parameters:
            raise NonFiniteGradientError(self._final_report("the parameters themselves are non-finite", report))
        if trainer.grad_scaler is not None:
            self._lower_loss_scale(trainer.grad_scaler, report)
            return False
        retry, limit = info.non_finite_grad_retry_count + 1, trainer.max_non_finite_grad_retries
        if limit is not None and retry > limit:
            raise NonFiniteGradientError(self._final_report(f"{limit} retries are used up", report))
        if limit is None and (tried := self._has_tried_enough(retry)):
            raise NonFiniteGradientError(self._final_report(f"{tried} gave no finite one", report))
        info.non_finite_grad_retry_count = retry
        trainer.logger.warning(
            f"{where(trainer)}: the gradient is not finite. The window is discarded and new data is drawn (retry"
            f" {retry}{'' if limit is None else f' of {limit}'}). {report}"
        )
        return True

    def _has_tried_enough(self, retry: int) -> str:
        """Whether the gradient has been non-finite for so long that another try is pointless. Call on every rank.

        Returns:
            The tries so far, in words. "": not enough yet.
        """
        if retry == 1:
            self._first_epoch = self._feed.epoch
        tried = ""
        if self._feed.epoch > self._first_epoch + 1:
            tried = "a whole epoch"
        elif retry >= _MAX_RETRIES_WITHOUT_EPOCHS and not self._feed.has_epochs:
            tried = f"{retry} windows"
        return max(gather_objects(tried))  # if each rank has its own data, the ranks may be in different epochs

    def _lower_loss_scale(self, scaler: torch.amp.GradScaler, report: NonFiniteReport) -> None:
        trainer = self._trainer
        scaler.update()  # `unscale_` has found an overflow, so this lowers the scale
        trainer.step_info.overflow_count += 1
        scale = scaler.get_scale()
        if scale < _MIN_LOSS_SCALE:
            raise NonFiniteGradientError(self._final_report(f"the loss scale collapsed to {scale:.3g}", report))
        trainer.logger.warning(f"{where(trainer)}: the gradient overflowed. Trying again with loss scale {scale:g}.")

    def _final_report(self, reason: str, report: NonFiniteReport) -> str:
        trainer = self._trainer
        return (
            f"{where(trainer)}: the gradient is not finite and {reason} (retries so far:"
            f" {trainer.step_info.non_finite_grad_retry_count}). {report}. {report.advice}"
        )


def where(trainer: BaseTrainer) -> str:
    """The step, and the phase if there are several, for messages."""
    return f"Step {trainer.step}" + (f", phase {trainer.phase!r}" if trainer.phase is not None else "")
