"""Runs inside a process of the run: records every step, and sends the signal that ends the life."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import FileSystem
from ..hook import BaseHook, CheckpointerHook
from ..records import map_nested_tensor
from .kills import FILE_OPERATIONS, KillAt

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class UnfitError(ValueError):
    """Nothing can be shown with this trainer."""


class Witness(BaseHook):
    """The last hook of a run that is to be compared.

    Args:
        trainer: The trainer. It must not be built yet.
        notes: The file for the notes, one line a step.
        kill: Where to send the signal on this rank, if at all.
        record: Returns what is recorded of a micro-batch.

    Attributes:
        count: How often the event of `kill` has occurred.
        after_train: The records that were logged after the last step.
    """

    def __init__(
        self, trainer: BaseTrainer, notes: Path, kill: KillAt | None, record: Callable[[Any], Any] | None
    ) -> None:
        self.count = 0
        self.after_train: list[Any] = []
        self.kill = kill
        self._trainer, self._notes = trainer, notes
        self._logged: list[Any] = []
        self._recorded: list[Any] = []
        build_hooks, forward = trainer.build_hooks, trainer.forward

        def build_watched_hooks() -> list[BaseHook]:
            hooks = list(build_hooks())
            if not any(isinstance(hook, CheckpointerHook) for hook in hooks):
                raise UnfitError(
                    f"`make_trainer` must give a trainer with a CheckpointingHook, but the hooks are {hooks}."
                )
            return [*hooks, self]

        def watched_forward(batch: Any) -> Any:
            self._reach("forward")
            if record is not None:
                self._recorded.append(record(batch))
            return forward(batch)

        trainer.build_hooks = build_watched_hooks  # type: ignore[method-assign]
        trainer.forward = watched_forward  # type: ignore[method-assign]
        for operation in FILE_OPERATIONS:  # never undone, because this process runs nothing else
            setattr(FileSystem, operation, self._watched(getattr(FileSystem, operation), operation))

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self._note({"start": trainer.step})
        self._reach("on_before_train")

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._reach("on_load_state_dict")

    def on_before_step(self, trainer: BaseTrainer) -> None:
        self._logged, self._recorded = [], []
        self._reach("on_before_step")

    def on_non_finite_grad(self, trainer: BaseTrainer, retry: int) -> None:
        self._reach("on_non_finite_grad")

    def on_before_optimizer_step(self, trainer: BaseTrainer) -> None:
        self._reach("on_before_optimizer_step")

    def on_after_optimizer_step(self, trainer: BaseTrainer) -> None:
        self._reach("on_after_optimizer_step")

    def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self._logged.append(records)
        self._reach("on_log")

    def on_log_images(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self._reach("on_log_images")

    def on_log_histogram(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self._reach("on_log_histogram")

    def on_log_text(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
        self._reach("on_log_text")

    def on_after_step(self, trainer: BaseTrainer) -> None:
        info = trainer.step_info
        row = {
            "step": trainer.step,
            "losses": info.losses,
            "grad_norm": info.grad_norm,
            "retries": info.non_finite_grad_retry_count,
            "lr": [group["lr"] for group in trainer.optimizer.param_groups],
            "logged": self._logged,
            "recorded": self._recorded,
        }
        self._note(row)
        self._logged = []
        self._reach("on_after_step")

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._reach("on_state_dict")

    def on_after_train(self, trainer: BaseTrainer) -> None:
        self.after_train = self._logged
        self._reach("on_after_train")

    def _watched(self, operate: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def watched(fs: FileSystem, *args: Any) -> Any:
            self._reach(operation)
            return operate(fs, *args)

        return watched

    def _reach(self, event: str) -> None:
        kill = self.kill
        if kill is None or self._trainer.step < kill.step:
            return
        if event == kill.event or (kill.event == "disk" and event in FILE_OPERATIONS):
            self.count += 1
            if self.count == kill.number:
                self._note({"killed": self._trainer.step})
                os.kill(os.getpid(), kill.signal)

    def _note(self, row: dict[str, Any]) -> None:
        """Write a note at once: the next line of code may be the last."""
        plain = map_nested_tensor(_plain, row)
        with self._notes.open("a") as file:
            file.write(json.dumps(plain, default=_values) + "\n")


def _plain(tensor: torch.Tensor) -> Any:
    """A number, or dtype, shape and numbers. Of a sharded tensor: this rank's part."""
    tensor = tensor.detach()
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.item() if local.dim() == 0 else [str(local.dtype), list(local.shape), local.reshape(-1).tolist()]


def _values(value: Any) -> Any:
    """An array as lists of numbers. Other values that JSON doesn't support, as text."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
