"""Measures the peak CUDA memory of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..hook import BaseHook

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class CudaMaxMemoryHook(BaseHook):
    """Writes each step's peak of allocated CUDA memory, in GiB, into `step_info.max_memory`.

    It resets torch's peak counter at every step. On a run without CUDA it does nothing, and says so once.
    """

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self._device = trainer.device if trainer.device.type == "cuda" else None
        if self._device is None:
            trainer.logger.warning(f"CudaMaxMemoryHook does nothing, because the run is on {trainer.device.type}.")

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if self._device is not None:
            trainer.step_info.max_memory = torch.cuda.max_memory_allocated(self._device) / 2**30
