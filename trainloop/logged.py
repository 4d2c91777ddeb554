"""What a trainer passes to its hooks to be logged: numbers, images, histograms and texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from .hook import listeners
from .records import Records

if TYPE_CHECKING:
    from .trainer import BaseTrainer


class Logging:
    """The part of `BaseTrainer` that logs."""

    def log(self, records: Records, dry_run: bool = False) -> None:
        """Pass numbers to every hook's `on_log`. Call on any rank; hooks that write do so on rank 0.

        Args:
            records: Nested numbers or 0-dim tensors, for example `{"val": {"loss": 0.1}}`.
            dry_run: The hooks only say what they would write.
        """
        trainer = cast("BaseTrainer", self)
        for hook in listeners(trainer, "log", records):
            hook.on_log(trainer, records, dry_run or trainer.dry_run)

    def log_images(self, records: dict[str, Any], dry_run: bool = False) -> None:
        """Pass images to every hook's `on_log_images`. Call on every rank if there are DTensors among them.

        Args:
            records: Nested images: Pillow's, tensors or numpy arrays, H x W or C x H x W, or batches N x C x H x W.
            dry_run: The hooks only say what they would write.
        """
        trainer = cast("BaseTrainer", self)
        for hook in listeners(trainer, "log_images", records):
            hook.on_log_images(trainer, records, dry_run or trainer.dry_run)

    def log_histogram(self, records: dict[str, Any], dry_run: bool = False) -> None:
        """Pass values to every hook's `on_log_histogram`. Hooks that write count them in 64 bins. Call on every rank
        if there are DTensors among them.

        Args:
            records: Nested tensors or numpy arrays of real numbers, of any shape: `{"weights": self.model.weight}`.
            dry_run: The hooks only say what they would write.
        """
        trainer = cast("BaseTrainer", self)
        for hook in listeners(trainer, "log_histogram", records):
            hook.on_log_histogram(trainer, records, dry_run or trainer.dry_run)

    def log_text(self, records: dict[str, Any], dry_run: bool = False) -> None:
        """Pass texts to every hook's `on_log_text`. Call on any rank; hooks that write do so on rank 0.

        Args:
            records: Nested strings, for example `{"samples": {"first": "Once upon a time"}}`.
            dry_run: The hooks only say what they would write.
        """
        trainer = cast("BaseTrainer", self)
        for hook in listeners(trainer, "log_text", records):
            hook.on_log_text(trainer, records, dry_run or trainer.dry_run)
