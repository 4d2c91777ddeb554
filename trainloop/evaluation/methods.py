"""The methods of a trainer that need no training: load weights, evaluate, and predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..state.weights import load_weights
from . import evaluate
from .prediction import predict
from .totals import Reduce

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class Evaluating:
    """The part of `BaseTrainer` that needs no training. Each method builds the run first, if necessary."""

    eval_data_loader: Any
    _weights_from: str = ""
    """The source of weights that `load_weights` has loaded. "": the weights are those of the run."""

    def load_weights(self, which: int | str | Path, *, ema: str | None = None) -> Path:
        """Load the weights of a checkpoint into the model, to evaluate, predict or sample. Call on every rank.

        Only weights and buffers are loaded, not the optimizer, step or position in the data. So a later `train` is
        refused; to train, use `CheckpointingHook(load=...)`. The folder is not locked: its run may still be training.

        Args:
            which: A step. Or "latest", the newest healthy checkpoint. Or "best:val/loss" or "best:val/accuracy:max",
                the checkpoint with the best value of a metric; "best" uses the metric of the run's `BestK`. These are
                looked up in the folder of the run's first `CheckpointingHook`. Or a path: a checkpoint, a folder of
                checkpoints (its newest healthy one), or a checkpoint of another tool, as for `CheckpointingHook`.
            ema: The `name` of an `EmaHook` whose average is loaded instead of the weights. None: the weights; with a
                schedule-free optimizer, the averaged ones.

        Returns:
            The checkpoint's folder, or the path of another tool's checkpoint.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: `which` is "best:" without a metric.
            RuntimeError: `train` is running.
            CheckpointError: On every rank. There is no such checkpoint, it is damaged, or it belongs to another model.
        """
        trainer = cast("BaseTrainer", self)
        trainer._build()
        path = load_weights(trainer, which, ema)
        trainer._initial_weights.drop()
        return path

    def evaluate(
        self,
        data_loader: Any = None,
        *,
        reduce: Mapping[str, Reduce] | None = None,
        limit_batches: int | None = None,
    ) -> dict[str, Any]:
        """Run `eval_forward` over held-out data. Call on every rank, between steps. Logs nothing.

        Each sample counts exactly once, at any number of ranks. Loss and records are averaged over the batches,
        weighted by their number of samples, or by `batch_weight` if it is overridden. Each batch gets the same random
        numbers at every evaluation. The training run's modes, buffers, random generators and position don't change, bit
        for bit. BatchNorm uses rank 0's statistics on every rank.

        Args:
            data_loader: As `build_eval_data_loader` returns it. None: the data of that method.
            reduce: How each record is reduced over batches and ranks, by its name ("a/b"): "mean" (the default), "sum",
                "max" or "min".
            limit_batches: Evaluate only this many batches of each data set, counted over all ranks.

        Returns:
            `{"loss": …, <records>}`, nested and the same on every rank, as `finish_evaluation` returned it: numbers,
            and the values that `PerSample` has collected. For a mapping of loaders: such a dict for each name.

        Raises:
            TypeError: The data is not iterable.
            ValueError: There is no data, or it cannot be sharded so that each sample counts once.
        """
        trainer = self._built()
        result = evaluate(trainer, self._data("evaluate", data_loader), reduce or {}, limit_batches=limit_batches)
        assert result is not None, "nothing may stop it"
        return result

    def predict(
        self,
        data_loader: Any = None,
        *,
        on_batch: Callable[[Any], None] | None = None,
        limit_batches: int | None = None,
    ) -> Any:
        """Run `predict_forward` over data, and collect its outputs in the order of the data. Call on every rank.

        Each sample appears exactly once, at any number of ranks. As in `evaluate`, the batches get the same random
        numbers each time, and the training run doesn't change.

        Args:
            data_loader: As `build_eval_data_loader` returns it. None: the data of that method.
            on_batch: Called on rank 0 with the output of each batch, in the order of the data. The outputs are not kept
                then, so you can write outputs to a file that would not fit into memory.
            limit_batches: Predict only this many batches, counted over all ranks.

        Returns:
            The outputs of all samples, nested as `predict_forward` returns them, on the CPU and on every rank. For a
            mapping of loaders: the outputs for each name. None with `on_batch`.

        Raises:
            TypeError: An output is not a tensor, array or list, or an argument has the wrong type.
            ValueError: An output doesn't have one value per sample, or there is no data.
        """
        return predict(self._built(), self._data("predict", data_loader), on_batch, limit_batches)

    def _data(self, method: str, data_loader: Any) -> Any:
        data = data_loader if data_loader is not None else self.eval_data_loader
        if data is None:
            raise ValueError(f"`{method}` has no data: `build_eval_data_loader` returned None. Override it.")
        return data

    def _built(self) -> BaseTrainer:
        trainer = cast("BaseTrainer", self)
        trainer._build()
        trainer._initial_weights.fill()
        return trainer
