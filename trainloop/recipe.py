"""What a subclass of `BaseTrainer` writes: the factories, `forward`, and what a micro-batch weighs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .hook import BaseHook
from .records import Records

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class Recipe:
    """The part of `BaseTrainer` that a subclass overrides. The factories are called once, in the order of this class,
    on every rank.
    """

    model: nn.Module
    forward_methods: Sequence[str] = ()
    """Methods of the model, besides the model itself, that `forward` calls on `self.model`, as `self.model.encode(x)`.
    The model may name them too, in an attribute `forward_methods`."""

    frozen: nn.Module | dict[str, nn.Module] | None = None
    """What `build_frozen` returned, ready for use."""

    frozen_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
    """The dtype of `build_frozen`'s modules, or of those that it names. None: that of the launch's mixed precision."""

    shard_frozen: bool = False
    """Whether FSDP2 shards `build_frozen`'s modules over all ranks too, which saves memory and costs communication."""

    def build_data_loader(self) -> Iterable[Any]:
        """Return the training data: a `DataLoader` for one process (it is sharded over the ranks), or any iterable of
        batches. Required.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `build_data_loader`.")

    def build_eval_data_loader(self) -> Any:
        """Return the data that `evaluate` takes by default: a `DataLoader` for one process (it is sharded over the
        ranks such that each sample counts once), any iterable of batches, a mapping from names to such; or None.
        """
        return None

    def build_frozen(self) -> nn.Module | Mapping[str, nn.Module] | None:
        """Return frozen modules that `forward` needs beside the model, as a VAE or a text encoder: one, or several by
        name. Then `self.frozen` is that module, or a dict of them.

        They are moved to the device, in eval mode, without gradients, the same on every rank, and in the launch's
        precision: cast what you give them, `self.frozen["vae"].encode(images.to(self.frozen["vae"].dtype))`. They are
        neither wrapped nor saved. A method other than `forward` of a sharded one must be named in its attribute
        `forward_methods`.
        """
        return None

    def build_model(self) -> nn.Module | Mapping[str, nn.Module]:
        """Return the plain model; it is moved and wrapped by Accelerate. Or a mapping from names to modules, which are
        wrapped each by itself: `self.model["generator"]`. Required.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `build_model`.")

    def build_optimizer(self) -> Optimizer | Mapping[str, Optimizer]:
        """Return the optimizer of `self.model`'s parameters, or a mapping from names to optimizers that step together,
        for example Muon for the matrices and AdamW for the rest. `self.optimizer[name]` is one of them. Required.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `build_optimizer`.")

    def build_lr_scheduler(self) -> LRScheduler | Mapping[str, Any] | None:
        """Return a scheduler of `self.optimizer` that moves once per applied update, or None. Of several optimizers:
        one scheduler for all, or a mapping from their names to schedulers.

        `ReduceLROnPlateau` moves with each evaluation. Return it with the metric that an `EvaluationHook` logs:
        `{"scheduler": ReduceLROnPlateau(self.optimizer), "monitor": "val/loss"}`.
        """
        return None

    def phases(self) -> Sequence[str]:
        """Return the phases of the step that begins, in order, for example `("discriminator", "generator")`. They may
        depend on `self.step`, alike on every rank. By default a step has only one, without a name.

        Each phase runs `forward` on the same window, where `self.phase` says whose loss it is, and then steps the
        optimizer of its name. The parameters of other optimizers do not require grad meanwhile. `build_optimizer`
        returns the optimizers by the names of the phases, and `build_lr_scheduler` the schedules, if there are any.
        """
        return ()

    def build_grad_scaler(self) -> torch.amp.GradScaler | None:
        """Return a grad scaler to use instead of Accelerate's own, or None."""
        return None

    def build_hooks(self) -> list[BaseHook]:
        """Return the hooks, called in this order."""
        return []

    def forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        """Compute the loss of one micro-batch. Required.

        Args:
            batch: What the data loader yields, on the device.

        Returns:
            The loss, a 0-dim tensor that requires grad, and nested records of numbers or 0-dim tensors to be averaged
            and logged (pass tensors: reading them is left to the log interval). A loss of None skips the micro-batch
            and draws another; on several ranks all must do so alike, without having called `self.model`. What one rank
            alone wants to drop gets a `batch_weight` of 0 instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward`.")

    def eval_forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        """Compute loss and records of one batch of the evaluation data; the model is in eval mode, without gradients.
        By default `forward`.

        Args:
            batch: What the evaluation's data loader yields, on the device.

        Returns:
            As `forward`. The records may also hold objects with `update`, which was called with this batch, `compute`,
            which reduces over the ranks, and `reset`, as torchmetrics has them; objects of Hugging Face's `evaluate`
            whose `add_batch` was called with this batch (the same objects for every batch); and `trainloop.PerSample`,
            whose values are collected over all samples.
        """
        return self.forward(batch)

    def finish_evaluation(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Derive metrics at the end of an evaluation of one data set, for example the perplexity from the mean loss. By
        default, return them as they are. Every rank, with the same metrics.

        Args:
            metrics: Nested numbers over all samples, and the values that each `trainloop.PerSample` has collected.

        Returns:
            The metrics of the evaluation. Those that are no numbers are not logged.
        """
        return metrics

    def predict_forward(self, batch: Any) -> Any:
        """Compute what `predict` collects for one batch; the model is in eval mode, without gradients.

        By default, call `self.model`: with a mapping as keyword arguments, with the first element of a tuple or list
        (the inputs of `inputs, targets`), or with the batch itself.

        Args:
            batch: What the data loader yields, on the device.

        Returns:
            A tensor or a numpy array, batch x anything; a list with an item for each sample; or a mapping or tuple of
            such.
        """
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(batch[0] if isinstance(batch, list | tuple) else batch)

    def batch_weight(self, batch: Any) -> float | torch.Tensor | None:
        """How much this micro-batch weighs in the step's mean loss, for example its number of target tokens.

        With it the step's loss is the exact weighted mean over the window and all ranks, if `forward` returns the mean
        over the micro-batch. A weight of 0 drops the micro-batch: it runs, and adds exactly nothing, NaN included.

        Args:
            batch: What the data loader yields, on the device.

        Returns:
            A number >= 0 or a 0-dim tensor; None: all weigh the same. A number or a CPU tensor is best: of a weight on
            an accelerator only the loss can be masked when it is 0, since reading it would cost a sync.
        """
        return None

    def _has_phases(self) -> bool:
        return type(self).phases is not Recipe.phases

    def _has_batch_weight(self) -> bool:
        return type(self).batch_weight is not Recipe.batch_weight
