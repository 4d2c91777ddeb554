"""Decides when the run is evaluated and with which weights, and logs the result."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import check_int, check_interval, describe
from ..evaluation import evaluate
from ..evaluation.totals import Reduce
from ..hook import BaseHook, progress
from ..records import ShownRecords, flatten_nested_dict, is_number, unflatten_nested_dict
from ..rehearsal import limit_of_evaluation
from .ema import EmaHook

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class EvaluationHook(BaseHook):
    """Evaluates every `interval` steps, and logs `{prefix: {"loss": …, <records>}}`, exact over all samples and ranks.

    See `BaseTrainer.evaluate` for the computation. The numbers go to every hook's `on_log` and into the metrics of the
    next checkpoint, which `BestK` uses. If a checkpoint is due at the same step, it gets the numbers of that step.
    Evaluation doesn't change training: the run continues bit for bit as without it. An exit signal ends an evaluation
    early. The resumed run then repeats it at its first step, and logs it under the number of that step.

    Args:
        interval: Optimizer steps between two evaluations. "epoch": evaluate at the step that ends an epoch of the data.
        data_loader: The data, as `BaseTrainer.build_eval_data_loader` returns it. None: the data of that method.
        ema: Evaluate with the averaged weights of this hook, which must be one of the run's hooks.
        prefix: Name under which the numbers are logged. Several hooks need different prefixes.
        reduce: How each record is reduced over batches and ranks, by its name ("a/b"): "mean" (the default), "sum",
            "max" or "min".
        limit_batches: Evaluate only this many batches of each data set, counted over all ranks.
        at_start: Also evaluate before the first step. The result is logged as step 0.
        at_end: Also evaluate after the last step.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    evaluates = True  # so that `build_lr_scheduler` may monitor its numbers

    def __init__(
        self,
        interval: int | str,
        *,
        data_loader: Any = None,
        ema: EmaHook | None = None,
        prefix: str = "val",
        reduce: Mapping[str, Reduce] | None = None,
        limit_batches: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
    ) -> None:
        check_interval("interval", interval)
        check_int("limit_batches", limit_batches, 1, optional=True)
        if ema is not None and not isinstance(ema, EmaHook):
            raise TypeError(f"`ema` must be an EmaHook or None, but is {describe(ema)}.")
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(f"`prefix` must be a name, but is {prefix!r}.")
        self.interval = interval
        self.data_loader = data_loader
        self.ema = ema
        self.prefix = prefix
        self.reduce = dict(reduce or {})
        self.limit_batches = limit_batches
        self.at_start = at_start
        self.at_end = at_end
        self._is_pending = self._has_warned = False

    def on_before_train(self, trainer: BaseTrainer) -> None:
        if self.data_loader is None and trainer.eval_data_loader is None:
            raise ValueError(
                f"EvaluationHook (prefix {self.prefix!r}) has no data: `build_eval_data_loader` returned None. Override"
                " it, or pass `data_loader`."
            )
        if self.ema is not None and self.ema not in trainer.hooks:
            raise ValueError(
                f"`ema` of EvaluationHook (prefix {self.prefix!r}) must be one of the run's hooks, or it averages"
                " nothing. Return it from `build_hooks` as well."
            )
        if sum(isinstance(hook, EvaluationHook) and hook.prefix == self.prefix for hook in trainer.hooks) > 1:
            raise ValueError(f"The `prefix`es of several EvaluationHooks must differ, but two are {self.prefix!r}.")
        self._is_pending = self.at_start and trainer.step == 0 and not trainer.dry_run

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if self._is_pending:
            step = trainer.step
            if step == 1:
                trainer.step = 0  # the weights are the initial ones, not those of step 1
            try:
                self._evaluate(trainer)
            finally:
                trainer.step = step

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.is_due(self.interval) or (self.at_end and trainer.is_finished):
            self._evaluate(trainer)

    def _evaluate(self, trainer: BaseTrainer) -> None:
        self._is_pending = True
        if trainer.control.agreed["exit_signal"]:
            return
        data = self.data_loader if self.data_loader is not None else trainer.eval_data_loader
        with self.ema.swapped(trainer) if self.ema is not None else nullcontext():
            ask = trainer.control.start_agreeing_on_exit
            limit = limit_of_evaluation(trainer, self.limit_batches)
            result = evaluate(trainer, data, self.reduce, start_asking=ask, limit_batches=limit)
        if result is None:
            trainer.logger.warning(f"Step {trainer.step}: a signal ended the evaluation. The resumed run repeats it.")
            return
        self._is_pending = False
        flat = {key: value for key, value in flatten_nested_dict({self.prefix: result}).items() if is_number(value)}
        shown = [f"{'/'.join(map(str, key[1:]))} {value:.4g}" for key, value in flat.items()]
        trainer.logger.info(f"{progress(trainer)} | {self.prefix}: {' | '.join(shown)}")
        trainer.log(ShownRecords(unflatten_nested_dict(flat)))
        if trainer.lr_monitor is not None and trainer.step > 0:
            self._move_schedule(trainer, trainer.lr_monitor, {"/".join(map(str, key)): n for key, n in flat.items()})

    def _move_schedule(self, trainer: BaseTrainer, monitor: str, numbers: Mapping[str, Any]) -> None:
        """Step ReduceLROnPlateau with the metric that it monitors. The metric is the same on every rank."""
        scheduler: Any = trainer.lr_scheduler
        if monitor in numbers:
            scheduler.step(numbers[monitor])
        elif not self._has_warned and sum(isinstance(hook, EvaluationHook) for hook in trainer.hooks) == 1:
            self._has_warned = True
            trainer.logger.warning(
                f"Step {trainer.step}: the evaluation has not logged {monitor!r}, the schedule's `monitor`, so the"
                f" learning rate does not change. It logged: {', '.join(sorted(numbers))}."
            )

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        state_dict[f"evaluation_{self.prefix}"] = {"is_pending": self._is_pending}

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._is_pending = state_dict.get(f"evaluation_{self.prefix}", {}).get("is_pending", False)
