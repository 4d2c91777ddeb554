"""Means over a log interval: a line and a bar for people, records for trackers."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import check_int, check_interval, describe
from ..hook import BaseHook, progress
from ..ranks import collectives
from ..records import flat_average, flatten_nested_dict, read_rows, unflatten_nested_dict
from ..setup.summary import model_summary
from ..step.info import StepInfo, TrainingStats
from ..step.optimizers import group_names
from ..terminal import Bar

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

Key = tuple[Any, ...]
_Own: TypeAlias = tuple[dict[Key, list[float]], int, float]  # sums and counts, retries, peak of the memory


class _StatsHook(BaseHook):
    """Collects the steps of an interval, and passes their means to `process`.

    Tensors stay on the device until the interval ends; then they are read in one transfer. If a checkpoint falls into
    an interval, the resumed run logs the whole interval as usual (at the same number of processes).
    """

    reports_end = False  # whether the last step is reported too if no interval ends with it

    def __init__(self, interval: int | str, sync: bool) -> None:
        check_interval("interval", interval)
        if not isinstance(sync, bool):
            raise TypeError(f"`sync` must be True or False, but is {describe(sync)}.")
        self.interval = interval
        self.sync = sync
        self._lr: dict[str, float] = {}
        self._start_interval()

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do: state is saved under this name."""
        every = "epoch" if self.interval == "epoch" else f"{self.interval} steps"
        return [(f"report every {every} as a {type(self).__name__}", "interval")]

    def _start_interval(self) -> None:
        self._steps: list[StepInfo] = []
        self._last_step = 0
        self._sums: dict[Key, list[float]] = {}  # of the steps that have been read: [sum, count]
        self._retries = 0
        self._max_memory = -math.inf

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self._steps.append(trainer.step_info)
        self._last_step = trainer.step
        is_due = trainer.is_due(self.interval)
        if is_due or (self.reports_end and trainer.is_finished):
            pairs = zip(group_names(trainer.optimizer), trainer.step_info.lr, strict=True)
            self._lr = {name: float(lr) for name, lr in pairs}
            self._read_steps(trainer)
            stats = self._stats(trainer._feed.records())
            if is_due:  # otherwise a run that is extended goes on with this interval
                self._start_interval()
            self.process(trainer, stats)

    def process(self, trainer: BaseTrainer, stats: TrainingStats) -> None:
        """Handle the end of an interval. Every rank.

        Args:
            trainer: The trainer.
            stats: The means of the interval.
        """
        raise NotImplementedError

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._read_steps(trainer)
        state_dict["rank"][self._state_key] = {
            "sums": {json.dumps(key): values for key, values in self._sums.items()},
            "retries": self._retries,
            "max_memory": self._max_memory,
        }

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self._start_interval()
        state = (state_dict.get("rank") or {}).get(self._state_key)
        if state is not None:
            self._sums = {tuple(json.loads(key)): [total, count] for key, (total, count) in state["sums"].items()}
            self._retries, self._max_memory = state["retries"], state["max_memory"]

    @property
    def _state_key(self) -> str:
        return f"{type(self).__name__}_{self.interval}"

    def _read_steps(self, trainer: BaseTrainer) -> None:
        """Add the collected steps to the sums. Costs one device-to-host sync."""
        if not self._steps:
            return
        rows: list[dict[Key, Any]] = []
        for info in self._steps:
            row: dict[Key, Any] = {
                ("loss",): info.loss,
                ("grad_norm",): info.grad_norm,
                ("step_time",): info.step_time,
                ("data_time",): info.data_time,
            }
            row.update({("records", *key): mean for key, mean in flat_average(info.records).items()})
            for name, phase in info.phases.items():
                means = flat_average(phase.records) | {("loss",): phase.loss, ("grad_norm",): phase.grad_norm}
                row.update({("records", name, *key): mean for key, mean in means.items()})
            rows.append(row)
            self._retries += info.non_finite_grad_retry_count
            if info.max_memory is not None:
                self._max_memory = max(self._max_memory, info.max_memory)
        first_step, self._steps = self._last_step - len(rows) + 1, []
        read = read_rows(rows)
        for checkpointer in trainer.checkpointers:
            checkpointer.note_losses(first_step, [row["loss",] for row in read])
        for row in read:
            for key, value in row.items():  # step by step, so that the sum doesn't depend on where a checkpoint was
                entry = self._sums.setdefault(key, [0.0, 0])
                entry[0] += value
                entry[1] += 1

    def _stats(self, data_records: dict[str, Any]) -> TrainingStats:
        """The means; with `sync`, over the ranks too. This is one exchange of host values. It also includes keys that
        only some ranks have.
        """
        own = (self._sums, self._retries, self._max_memory)
        sums, retries, max_memory = collectives.merge_over_ranks(own, _merged) if self.sync else own
        means = {key: total / count for key, (total, count) in sums.items()}
        return TrainingStats(
            loss=means.pop(("loss",)),
            grad_norm=means.pop(("grad_norm",)),
            step_time=means.pop(("step_time",)),
            data_time=means.pop(("data_time",)),
            non_finite_grad_retry_count=retries,
            max_memory=max_memory if max_memory > -math.inf else None,
            lr=self._lr,
            records={**data_records, **unflatten_nested_dict({key[1:]: mean for key, mean in means.items()})},
        )


def _merged(a: _Own, b: _Own) -> _Own:
    """Merge what two groups of ranks have collected."""
    sums = {key: list(entry) for key, entry in a[0].items()}
    for key, (total, count) in b[0].items():
        entry = sums.setdefault(key, [0.0, 0])
        entry[0] += total
        entry[1] += count
    return sums, max(a[1], b[1]), max(a[2], b[2])


class LoggingHook(_StatsHook):
    """Passes the means of every interval to `trainer.log`, as `{"train": {"loss": …, "lr": {…}, …, <records>}}`.

    Args:
        interval: Optimizer steps, or "epoch".
        sync: Also average over the ranks. A record that only some ranks have is averaged over these.
    """

    def __init__(self, interval: int | str = 10, sync: bool = True) -> None:
        super().__init__(interval, sync)

    def process(self, trainer: BaseTrainer, stats: TrainingStats) -> None:
        records: dict[str, Any] = {
            **stats.records,
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "step_time": stats.step_time,
            "data_time": stats.data_time,
            "non_finite_grad_retry_count": stats.non_finite_grad_retry_count,
            "lr": stats.lr,
        }
        if stats.max_memory is not None:
            records["max_memory"] = stats.max_memory
        trainer.log({"train": records})


class ProgressHook(_StatsHook):
    """Writes a log line every interval and at the last step, and shows a live bar on a terminal. On rank 0.

    Args:
        interval: Optimizer steps, or "epoch".
        with_records: Show the records of `forward` too.
        sync: Show means over the ranks instead of rank 0's.
        eta_warmup: Number of steps of this process that the estimate of the remaining time ignores. It is shown after
            them.
        show_units: Write units.
        verbose: Before the first step, also log a table of the model's modules: type, parameters, trainable parameters,
            and bytes on a rank.
    """

    reports_end = True

    def __init__(
        self,
        interval: int | str = 1,
        with_records: bool = False,
        sync: bool = False,
        eta_warmup: int = 10,
        show_units: bool = True,
        verbose: bool = False,
    ) -> None:
        super().__init__(interval, sync)
        check_int("eta_warmup", eta_warmup, 0)
        self.with_records = with_records
        self.eta_warmup = eta_warmup
        self.show_units = show_units
        self.verbose = verbose
        self._bar: Bar | None = None

    def on_before_train(self, trainer: BaseTrainer) -> None:
        if self.verbose:
            trainer.logger.info(f"The model:\n  {model_summary(trainer)}")

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if self._bar is None:
            self._bar = Bar(
                "training",
                trainer.max_steps,
                "step",
                done=trainer.step - 1,
                warmup=self.eta_warmup,
                is_drawn=trainer.accelerator.is_main_process,
            ).open()

    def on_after_step(self, trainer: BaseTrainer) -> None:
        assert self._bar is not None
        self._bar.total = trainer.max_steps  # of a run that counts epochs, it may change
        self._bar.update(trainer.step - self._bar.done)
        super().on_after_step(trainer)

    def process(self, trainer: BaseTrainer, stats: TrainingStats) -> None:
        if not trainer.accelerator.is_main_process:
            return
        assert self._bar is not None
        self._bar.note = f"loss {stats.loss:.4g}"
        trainer.logger.info(self._line(trainer, stats, self._bar.seconds_left()))

    def _line(self, trainer: BaseTrainer, stats: TrainingStats, seconds_left: float | None) -> str:
        seconds, gib = (" s", " GiB") if self.show_units else ("", "")
        parts = [
            progress(trainer),
            f"step time {stats.step_time:.3g}{seconds}",
            f"data time {stats.data_time:.3g}{seconds}",
        ]
        if seconds_left is not None:
            parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
        parts += [f"loss {stats.loss:.4g}", f"grad norm {stats.grad_norm:.4g}"]
        lrs = {name: f"{lr:.3g}" for name, lr in stats.lr.items()}
        same, each = next(iter(lrs.values()), ""), ", ".join(f"{name}={lr}" for name, lr in lrs.items())
        parts.append(f"lr {same if len({*lrs.values()}) == 1 else each}" if lrs else "no lr")
        if stats.non_finite_grad_retry_count:
            parts.append(f"retries {stats.non_finite_grad_retry_count:g}")
        if stats.max_memory is not None:
            parts.append(f"memory {stats.max_memory:.3g}{gib}")
        if self.with_records:
            flat = flatten_nested_dict(stats.records)
            parts += [f"{'/'.join(map(str, key))} {value:.4g}" for key, value in flat.items()]
        return " | ".join(parts)

    def on_after_train(self, trainer: BaseTrainer) -> None:
        self._close_bar()

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
