"""What a trainer offers without training: to load weights, and to evaluate them."""

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
    """The part of `BaseTrainer` that needs no training. Each method builds the run first, if that was not done."""

    eval_data_loader: Any
    _weights_from: str = ""
    """Where `load_weights` has found the weights; "": they are those of the run."""

    def load_weights(self, which: int | str | Path, *, ema: str | None = None) -> Path:
        """Load the weights of a checkpoint into the model, to evaluate, predict or sample. Call on every rank.

        Only weights and buffers are loaded: no optimizer, step or position in the data. So a later `train` is refused;
        to train, use `CheckpointingHook(load=...)`. The folder is not locked: its run may be training meanwhile.

        Args:
            which: A step; "latest", the newest healthy checkpoint; "best:val/loss" or "best:val/accuracy:max", the one
                with the best value of a metric; "best", by the metric of the run's `BestK`. These are looked for in the
                folder of the run's first `CheckpointingHook`. Or a path: of a checkpoint, of a folder of checkpoints
                (its newest healthy one is loaded), or of what another tool has saved, as for `CheckpointingHook`.
            ema: The `name` of an `EmaHook` whose average is loaded in place of the weights. None: the weights; of a
                schedule-free optimizer those to evaluate.

        Returns:
            What was loaded: the checkpoint's folder, or the path.

        Raises:
            TypeError: An argument has the wrong type.
            RuntimeError: `train` is running.
            CheckpointError: On every rank. There is no such checkpoint, it is damaged, or it is not of this model.
        """
        trainer = self._built()
        return load_weights(trainer, which, ema)

    def evaluate(
        self,
        data_loader: Any = None,
        *,
        reduce: Mapping[str, Reduce] | None = None,
        limit_batches: int | None = None,
    ) -> dict[str, Any]:
        """Run `eval_forward` over held-out data. Call on every rank, between steps; logs nothing.

        Each sample counts exactly once, at any number of ranks. Loss and records are averaged over the batches by their
        number of samples, or by `batch_weight` if it is overridden. Each batch draws the same noise at every
        evaluation. The training run's modes, buffers, random generators and position stay the same, bit for bit.
        BatchNorm uses rank 0's statistics everywhere.

        Args:
            data_loader: As `build_eval_data_loader` returns it. None: what that returned.
            reduce: By a record's name ("a/b"), how it is reduced over batches and ranks: "mean" (the default), "sum",
                "max" or "min".
            limit_batches: Evaluate on the first batches only, so many of each data set, counted over all ranks.

        Returns:
            `{"loss": …, <records>}`, nested and the same on every rank, as `finish_evaluation` returned it: numbers and
            what `PerSample` has collected. For a mapping of loaders by name.

        Raises:
            TypeError: The data is not iterable.
            ValueError: There is none, or it cannot be sharded such that each sample counts once.
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

        Each sample comes exactly once, at any number of ranks. The batches draw the same noise each time, and the
        training run is left as it was, as for `evaluate`.

        Args:
            data_loader: As `build_eval_data_loader` returns it. None: what that returned.
            on_batch: Called on rank 0 with the output of each batch, in the order of the data. Nothing is kept then, so
                that you can write outputs to a file which do not fit into memory.
            limit_batches: Predict for the first batches only, counted over all ranks.

        Returns:
            The outputs of all samples, nested as `predict_forward` returns them, on the CPU and on every rank; for a
            mapping of loaders by name. None with `on_batch`.

        Raises:
            TypeError: An output is no tensor, array or list, or an argument has the wrong type.
            ValueError: An output has no value for each sample, or there is no data.
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
        return trainer
