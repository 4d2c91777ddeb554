"""The methods that a subclass of `BaseTrainer` writes: the factories, `forward`, and the weight of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .hook import BaseHook
from .records import Records

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class Recipe:
    """The methods of `BaseTrainer` that a subclass overrides. The trainer calls each factory once, on every rank, in
    the order of this class.
    """

    model: nn.Module
    forward_methods: Sequence[str] = ()
    """Methods of the model that `forward` calls on `self.model` besides the model itself, for example
    `self.model.encode(x)`. The model may also name them, in an attribute `forward_methods`."""

    frozen: nn.Module | dict[str, nn.Module] | None = None
    """The modules that `build_frozen` returned, ready for use."""

    frozen_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
    """The dtype of `build_frozen`'s modules, or a mapping from their names to dtypes. None: that of the launch's mixed
    precision."""

    shard_frozen: bool = False
    """Whether FSDP2 shards `build_frozen`'s modules over all ranks too. This saves memory and costs communication."""

    def build_data_loader(self) -> Iterable[Any]:
        """Return the training data. Required.

        Returns:
            A `DataLoader` for one process (the trainer shards it over the ranks), or any iterable of batches.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `build_data_loader`.")

    def build_eval_data_loader(self) -> Any:
        """Return the data that `evaluate` uses by default.

        Returns:
            A `DataLoader` for one process (the trainer shards it over the ranks, and each sample counts once), any
            iterable of batches, a mapping from names to such data, or None.
        """
        return None

    def build_frozen(self) -> nn.Module | Mapping[str, nn.Module] | None:
        """Return frozen modules that `forward` needs beside the model, for example a VAE or a text encoder.

        The trainer moves them to the device, puts them into eval mode without gradients, makes them the same on every
        rank, and casts them to the launch's precision. So cast their inputs:
        `self.frozen["vae"].encode(images.to(self.frozen["vae"].dtype))`. They are neither wrapped nor saved. If a
        sharded module is called by another method than `forward`, name that method in its attribute `forward_methods`.

        Returns:
            One module, or several by name. `self.frozen` is then that module, or a dict of them.
        """
        return None

    def build_model(self) -> nn.Module | Mapping[str, nn.Module]:
        """Return the plain model, which Accelerate moves and wraps. Required.

        Returns:
            One module, or a mapping from names to modules. Accelerate then wraps each of them by itself, and
            `self.model["generator"]` is one of them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `build_model`.")

    def initial_weights(self) -> Path | str | None:
        """Return the path of the weights that the model starts with.

        Each rank reads its part. The files must contain all of the model's weights. Values are cast to the model's
        dtypes. If a checkpoint is restored, the files are read only for frozen parameters and persistent buffers.

        All or some tensors of `build_model` may be on the meta device. The model is then sharded first, and filled from
        these files. Without files, each module is initialised by its `reset_parameters`, and by the `_init_weights` of
        the model that contains it. The random numbers depend only on the seed and the module's name.

        Returns:
            A file or folder of safetensors, as for `from_pretrained`, or a checkpoint of trainloop. None: keep the
            weights of `build_model`.
        """
        return None

    def build_optimizer(self) -> Optimizer | Mapping[str, Optimizer]:
        """Return the optimizer of `self.model`'s parameters. Required.

        Returns:
            One optimizer, or a mapping from names to optimizers that step together, for example Muon for the matrices
            and AdamW for the rest. `self.optimizer[name]` is then one of them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `build_optimizer`.")

    def build_lr_scheduler(self) -> LRScheduler | Mapping[str, Any] | None:
        """Return a scheduler of `self.optimizer`, which moves once per applied update, or None.

        With several optimizers, return one scheduler for all, or a mapping from their names to schedulers.
        `ReduceLROnPlateau` moves with each evaluation. Return it with a metric that an `EvaluationHook` logs:
        `{"scheduler": ReduceLROnPlateau(self.optimizer), "monitor": "val/loss"}`.
        """
        return None

    def phases(self) -> Sequence[str]:
        """Return the phases of the step that begins, in order, for example `("discriminator", "generator")`. They may
        depend on `self.step`, but must be the same on every rank. By default a step has a single phase without a name.

        Each phase runs `forward` on the same window and then steps the optimizer of the same name. In `forward`,
        `self.phase` is the current phase. Parameters of other optimizers don't require grad in that phase.
        `build_optimizer` returns the optimizers by phase name; so does `build_lr_scheduler` with its schedules, if any.
        """
        return ()

    def build_grad_scaler(self) -> torch.amp.GradScaler | None:
        """Return a grad scaler to use instead of Accelerate's own, or None."""
        return None

    def build_hooks(self) -> list[BaseHook]:
        """Return the hooks. They are called in this order."""
        return []

    def forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        """Compute the loss of one micro-batch. Required.

        Args:
            batch: A batch of the data loader, on the device.

        Returns:
            The loss and the records. The loss is a 0-dim tensor that requires grad. Records are nested numbers or 0-dim
            tensors, which are averaged and logged; pass tensors, because they are read only once per log interval. A
            loss of None skips the micro-batch and draws another one. Every rank must then do so for the same
            micro-batch, without having called `self.model`. To drop a micro-batch on one rank only, return a
            `batch_weight` of 0 instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward`.")

    def eval_forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        """Compute loss and records of one evaluation batch. The model is in eval mode, without gradients. By default,
        call `forward`.

        Args:
            batch: A batch of the evaluation's data loader, on the device.

        Returns:
            The same as `forward`. The records may also hold: metric objects as of torchmetrics, with `update` (which
            you have called with this batch), `compute` (which reduces over the ranks) and `reset`; metrics of Hugging
            Face's `evaluate` (the same objects for every batch) whose `add_batch` you have called with this batch; and
            `trainloop.PerSample`, whose values are collected over all samples.
        """
        return self.forward(batch)

    def finish_evaluation(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Derive metrics at the end of the evaluation of one data set, for example the perplexity from the mean loss.
        By default, return them unchanged. Called on every rank, with the same metrics.

        Args:
            metrics: Nested numbers over all samples, and the values that each `trainloop.PerSample` has collected.

        Returns:
            The metrics of the evaluation. Only numbers are logged.
        """
        return metrics

    def predict_forward(self, batch: Any) -> Any:
        """Compute the output that `predict` collects for one batch. The model is in eval mode, without gradients.

        By default, call `self.model` with the batch: a mapping is passed as keyword arguments; of a tuple or list, the
        first element is passed (the inputs of `inputs, targets`).

        Args:
            batch: A batch of the data loader, on the device.

        Returns:
            A tensor or numpy array whose first dimension is the batch, a list with one item per sample, or a mapping or
            tuple of these.
        """
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(batch[0] if isinstance(batch, list | tuple) else batch)

    def batch_weight(self, batch: Any) -> float | torch.Tensor | None:
        """Return the weight of this micro-batch in the step's mean loss, for example its number of target tokens.

        If `forward` returns the mean over the micro-batch, the step's loss is then the exact weighted mean over the
        window and all ranks. A weight of 0 drops the micro-batch: it runs, but contributes exactly nothing, even if its
        loss is NaN.

        Args:
            batch: A batch of the data loader, on the device.

        Returns:
            A number >= 0 or a 0-dim tensor. None: all micro-batches weigh the same. Prefer a number or a CPU tensor:
            reading a weight on an accelerator would cost a sync, so a weight of 0 there only masks the loss.
        """
        return None

    def _has_phases(self) -> bool:
        return type(self).phases is not Recipe.phases

    def _has_batch_weight(self) -> bool:
        return type(self).batch_weight is not Recipe.batch_weight
