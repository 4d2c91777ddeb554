"""Checks the trainer's own arguments when it is constructed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from ..errors import check_int, describe
from .accelerate_options import check_kwargs_handlers
from .subclasses import check_trainer_class

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


def check_arguments(
    trainer: BaseTrainer, base: type[BaseTrainer], accelerator: Any, gradient_accumulation_steps: Any
) -> None:
    """Raise for mistakes in a new trainer: in its class, in the arguments that it has already stored, and in the last
    two arguments here. `base` is `BaseTrainer`.
    """
    check_trainer_class(type(trainer), base)
    check_int("max_steps", trainer.max_steps, 0, optional=True)
    check_int("max_epochs", trainer.max_epochs, 0, optional=True)
    if trainer.max_steps is None and trainer.max_epochs is None:
        raise ValueError("`max_steps` and `max_epochs` are both None. Pass one of them, so that the run has an end.")
    check_int("max_non_finite_grad_retries", trainer.max_non_finite_grad_retries, 0, optional=True)
    check_int("gradient_accumulation_steps", gradient_accumulation_steps, 1, optional=True)
    check_int("seed", trainer.seed, 0, optional=True)
    check_int("gc_interval", trainer.gc_interval, 1, optional=True)
    check_int("overfit_batches", trainer.overfit_batches, 1, optional=True)
    if not isinstance(trainer.dry_run, bool):
        raise TypeError(f"`dry_run` must be True or False, but is {describe(trainer.dry_run)}.")
    if trainer.seed is not None and trainer.seed >= 2**31:
        raise ValueError(f"`seed` must be below 2**31, but is {trainer.seed}.")
    clips = trainer.grad_clip if isinstance(trainer.grad_clip, Mapping) else {"": trainer.grad_clip}
    for name, clip in clips.items():
        _check_clip(f"grad_clip[{name!r}]" if name else "grad_clip", clip)
    choices = ("no", "fp16", "bf16", "fp8")  # `resolve_mixed_precision` refuses fp8, and explains why
    if trainer.mixed_precision is not None and trainer.mixed_precision not in choices:
        raise ValueError(f"`mixed_precision` must be one of {choices} or None, but is {trainer.mixed_precision!r}.")
    if not isinstance(trainer.no_sync_accumulate, bool):
        raise TypeError(f"`no_sync_accumulate` must be True or False, but is {describe(trainer.no_sync_accumulate)}.")
    if accelerator is not None and not isinstance(accelerator, Accelerator):
        raise TypeError(f"`accelerator` must be an accelerate.Accelerator, but is {describe(accelerator)}.")
    check_kwargs_handlers(
        trainer._kwargs_handlers, has_accelerator=accelerator is not None, has_timeout=trainer.timeout is not None
    )
    if trainer.state_dict_options is not None and type(trainer.state_dict_options).__name__ != "StateDictOptions":
        raise TypeError(
            "`state_dict_options` must be torch.distributed.checkpoint.state_dict.StateDictOptions, but is"
            f" {describe(trainer.state_dict_options)}."
        )


def _check_clip(name: str, clip: Any) -> None:
    if clip is None:
        return
    if isinstance(clip, bool) or not isinstance(clip, int | float):
        raise TypeError(f"`{name}` must be a number or None, but is {describe(clip)}.")
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"`{name}` must be positive and finite, but is {clip}. None turns clipping off.")


def parse_timeout(timeout: timedelta | float | None) -> timedelta | None:
    """The `timeout` argument as a `timedelta`."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, timedelta | int | float):
        raise TypeError(f"`timeout` must be a timedelta, seconds or None, but is {describe(timeout)}.")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"`timeout` must be positive and finite, but is {timeout}.")
    return timedelta(seconds=seconds)
