"""One window: N micro-batches forward and backward on every rank, and how a window is discarded.

run ─► draw ─► forward ─► backward     x N   (the last one reduces the gradient)
discard                                      drops gradients and restores buffers; the batches stay consumed
"""

from __future__ import annotations

import math
import time
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from ..errors import LossNoneWarning, TrainingError, check_int
from ..records import Records, check_output, check_records, map_nested_tensor
from .buffers import BufferKeeper
from .buffers_of_ddp import SharedBuffers
from .gradient_checks import GradientChecks, explain_backward
from .gradients import no_contribution
from .loss_weights import loss_factors, weighted_loss
from .models import modules_of
from .modes import Modes
from .retries import Retries, where

if TYPE_CHECKING:
    from ..data.feed import DataFeed
    from ..trainer import BaseTrainer

_NOTHING = nullcontext()


class Window:
    """Runs the windows of a trainer, one after another.

    Every rank runs a window to its end, even if it finds an error. If a rank left early, the others would wait for it,
    and under FSDP2 a missing backward pass would corrupt the next window.

    The phases of a step run the same window one after another. Its batches are kept until the end of the step.

    Args:
        trainer: The trainer. It must be built.
        feed: The source of the batches.
    """

    def __init__(self, trainer: BaseTrainer, feed: DataFeed) -> None:
        self.skipped: list[int] = []
        """Numbers of the draws in this window that gave no loss, from 0."""
        accelerator = trainer.accelerator
        self._trainer = trainer
        self._feed = feed
        self.buffers = BufferKeeper(trainer.unwrapped_model)
        self.modes = Modes(trainer)
        self._checks = GradientChecks(trainer.model, trainer.unwrapped_model)
        self._num_micro_steps = -1
        self._is_plain = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
        self._is_weighted = trainer._has_batch_weight()
        self._has_phases = trainer._has_phases()
        self._buffers_of_ddp = SharedBuffers(trainer.model) if self._has_phases else None
        self._kept: list[Any] = []  # batches of the window that were drawn early or will be used again
        self._factors: tuple[Any, Any] = (None, None)
        self._defers_reduction = trainer.no_sync_accumulate and accelerator.num_processes > 1
        self.is_updating = False
        """Whether the step's first update has begun and its last one is not complete."""
        self._is_updated = False
        self.is_in_step = False
        """True from a step's first hook until its update is complete."""
        self.has_run = False
        """Whether the step's window has begun."""
        self._checked_step = -1
        self._first_epoch = 0
        self._retries = Retries(trainer, feed)

    def begin_step(self) -> None:
        """Begin a step: increase the step number."""
        self.is_in_step = True
        self._trainer.step += 1
        self._trainer.peers.step = self._trainer.step
        self.has_run = self._is_updated = False
        self._kept = []

    def follow_trainable(self) -> None:
        """Call when other parameters require grad than before."""
        self.buffers.follow_trainable(self._trainer.unwrapped_model)
        self._checks = GradientChecks(self._trainer.model, self._trainer.unwrapped_model)

    def take_back(self) -> None:
        """After an exception: take the step back if its update has not begun, so that a later `train` repeats it. The
        buffers get their values from before the window. Its batches stay consumed, as in a discarded window.
        """
        if self.is_updating or self._is_updated:
            return  # see `check_whole`
        self._trainer.step -= 1
        if self.has_run:
            self.buffers.restore()

    def finish_update(self) -> None:
        """The step's update is complete: record which epochs have ended."""
        self.is_updating, self._is_updated = False, True
        self._kept = []
        trainer = self._trainer
        if trainer.control.num_epochs_done != trainer.epoch:
            trainer.step_info.ends_epoch = trainer.control.num_epochs_done > trainer.epoch
            trainer.epoch = trainer.control.num_epochs_done

    def check_whole(self) -> None:
        """Raise if the last `train` ended in the middle of an update.

        Raises:
            TrainingError: Weights, optimizer and schedule may belong to different steps.
        """
        if self.is_updating:
            raise TrainingError(
                f"The update of step {self._trainer.step} was interrupted, so weights, optimizer and learning rate may"
                " belong to different steps. Make a new trainer, which can resume from a checkpoint, or call"
                " `load_state_dict`."
            )

    def run(self) -> None:
        """Draw N micro-batches and run them forward and backward. Fills the trainer's `step_info`. Call on every rank.

        Raises:
            TrainingError: A whole epoch gave no loss.
            TypeError: `forward` did not return a loss and records.
            ValueError: The loss does not require grad, or it is None although `batch_weight` is overridden.
        """
        trainer, info = self._trainer, self._trainer.step_info
        num_micro_steps = self._take_accumulation()
        self._checks.before_forward()
        start = time.perf_counter()
        info.losses, info.records, info.loss_factors = [], [], None
        self.skipped = []
        self._first_epoch = self._feed.epoch
        self.buffers.remember()
        self.has_run = True
        if self._is_weighted:
            if not self._kept:
                self._draw_weighted(num_micro_steps)
            info.loss_factors, info.total_weight = self._factors
        micro_step = num_drawn = 0
        while micro_step < num_micro_steps:
            is_last = micro_step == num_micro_steps - 1
            if num_micro_steps > 1:
                trainer.accelerator.sync_gradients = is_last
            batch = self._kept[micro_step] if micro_step < len(self._kept) else self._next_batch()
            factor = None if info.loss_factors is None else info.loss_factors[micro_step]
            if self._buffers_of_ddp is not None:
                self._buffers_of_ddp.begin()
            with self._micro_batch_context(is_last, factor):
                loss, records = self._check(trainer.forward(batch))
                if loss is None:
                    self._skip(num_drawn)
                    del self._kept[micro_step : micro_step + 1]
                else:
                    self._checks.after_forward()
                    info.losses.append(loss.detach())
                    info.records.append(map_nested_tensor(torch.Tensor.detach, records) if records else records)
                    if is_last:
                        info.own_time = time.perf_counter() - start
                    if self._has_phases and micro_step == len(self._kept):
                        self._kept.append(batch)
                    self._backward(loss if factor is None else weighted_loss(loss, factor), num_micro_steps)
                    micro_step += 1
            num_drawn += 1
        self._checks.after_backward()
        if self._feed.bad_samples is not None and self._feed.bad_samples.new:
            trainer.control.ask("bad_samples")

    def tell_bad_samples(self) -> None:
        """Log the samples that the window could not read. Call on every rank, after the ranks have agreed.

        Raises:
            TrainingError: There are too many such samples.
        """
        if self._trainer.control.take("bad_samples") and self._feed.bad_samples is not None:
            self._feed.bad_samples.exchange(self._trainer.logger, self._trainer.step)

    def discard(self) -> bool:
        """Undo the window after every rank has run it to its end. Call on every rank.

        Returns:
            Whether it counts as a retry. A window with a too high loss scale doesn't.

        Raises:
            NonFiniteGradientError: Another window would be pointless.
        """
        self.buffers.restore()
        self._kept = []
        return self._retries.count()

    def can_be_applied(self) -> bool:
        """Whether the window's gradient can be applied: its norm is finite, or only the norm has overflowed. In the
        second case this clips the gradient. Call on every rank.
        """
        trainer = self._trainer
        if math.isfinite(trainer.step_info.grad_norm):
            return True
        overflown = trainer._gradients.clip_overflown()
        if overflown is None:
            return False
        trainer.step_info.grad_norm = overflown
        clipped = "clipped and " if trainer.grad_clip is not None else ""
        text = f"the gradient norm overflowed ({overflown:.3g}), but every gradient is finite."
        trainer.logger.warning(f"{where(self._trainer)}: {text} The gradient is {clipped}applied.")
        return True

    def _take_accumulation(self) -> int:
        """Number of micro-batches of this window. A hook may change `gradient_accumulation_steps` between two steps, in
        the same way on every rank. Accelerate has its own copy of the number, so it is updated here.
        """
        trainer = self._trainer
        num_micro_steps = trainer.gradient_accumulation_steps
        if num_micro_steps != self._num_micro_steps:
            check_int("gradient_accumulation_steps", num_micro_steps, 1)
            trainer.accelerator.gradient_state.plugin_kwargs["num_steps"] = num_micro_steps
            trainer.accelerator.sync_gradients = True
            self._num_micro_steps = num_micro_steps
            trainer._length.update(trainer.step - 1)
        return num_micro_steps

    # ------------------------------------------------------------------ drawing

    def _next_batch(self) -> Any:
        start = time.perf_counter()
        batch = next(self._feed)
        self._trainer.step_info.data_time += time.perf_counter() - start
        return batch

    def look_ahead(self) -> None:
        """Fetch the next batch while the device works on this window. Call before the host waits for the device."""
        trainer = self._trainer
        if self._feed.can_look_ahead and trainer.step != trainer.max_steps:
            start = time.perf_counter()
            self._feed.look_ahead()
            trainer.step_info.data_time += time.perf_counter() - start

    def _draw_weighted(self, num_micro_steps: int) -> None:
        """Draw the window before its first backward, because each micro-batch's factor depends on all weights."""
        trainer, info = self._trainer, self._trainer.step_info
        while True:
            batches = [self._next_batch() for _ in range(num_micro_steps)]
            factors, total = loss_factors([trainer.batch_weight(batch) for batch in batches], trainer.device)
            if factors != []:
                self._kept, self._factors = batches, (factors, total)
                return
            info.skipped_micro_batch_count += len(batches)  # all weights are 0 on all ranks: draw another window
            self._check_progress()

    def _skip(self, draw: int) -> None:
        self.skipped.append(draw)
        self._trainer.step_info.skipped_micro_batch_count += 1
        if self._is_weighted:
            raise ValueError(
                "`forward` returned None for the loss, but the window's weights are already agreed on, because"
                " `batch_weight` is overridden. Return 0 from `batch_weight` for a micro-batch to be dropped."
            )
        if self._trainer.accelerator.num_processes > 1:
            warnings.warn(
                "`forward` returned None for the loss. Every rank must do so for the same micro-batch, and must not"
                " have called the model. To drop a micro-batch on one rank only, return 0 from `batch_weight`.",
                LossNoneWarning,
                stacklevel=4,
            )
        self._check_progress()

    def _check_progress(self) -> None:
        """Raise if a whole epoch gave no loss. Otherwise the run would draw forever."""
        if not self._trainer.step_info.losses and self._feed.epoch > self._first_epoch + 1:
            raise TrainingError(
                f"{where(self._trainer)}: no micro-batch of a whole epoch gave a loss. `forward` returned None, or"
                " `batch_weight` returned 0, for each of them."
            )

    # ------------------------------------------------------------------ forward and backward

    def _micro_batch_context(self, is_last: bool, factor: Any) -> AbstractContextManager[Any]:
        """The context of one micro-batch. Only the last one reduces gradients. A micro-batch of weight 0 leaves neither
        a gradient nor a change in the buffers. The host doesn't read a weight on the device; then only `weighted_loss`
        masks the loss.
        """
        is_deferred = self._defers_reduction and not is_last
        is_dropped = isinstance(factor, float) and factor == 0.0
        if not (is_deferred or is_dropped):
            return _NOTHING
        trainer, stack = self._trainer, ExitStack()
        if is_deferred:
            for module in modules_of(trainer.model):
                stack.enter_context(trainer.accelerator.no_sync(module))
        if is_dropped:
            stack.enter_context(no_contribution(trainer.model))
            stack.enter_context(self.buffers.fork(trainer.unwrapped_model).kept())
        return stack

    def _check(self, output: Any) -> tuple[torch.Tensor | None, Records]:
        loss, records = check_output(output, "forward")
        if loss is not None and not loss.requires_grad:
            raise ValueError(
                "The loss that `forward` returns does not require grad: it was detached, computed under"
                " `torch.no_grad()`, or doesn't depend on the model."
            )
        if self._trainer.step != self._checked_step:  # once a step catches mistakes early, and costs almost nothing
            self._checked_step = self._trainer.step
            check_records(records)
        return loss, records

    def _backward(self, loss: torch.Tensor, num_micro_steps: int) -> None:
        if self._is_plain:  # the same as `accelerator.backward` here, without its overhead
            share = loss if num_micro_steps == 1 else loss / num_micro_steps
            share.backward()  # type: ignore[no-untyped-call]
            return
        try:
            self._trainer.accelerator.backward(loss)
        except RuntimeError as ex:
            explain_backward(ex)
            raise
