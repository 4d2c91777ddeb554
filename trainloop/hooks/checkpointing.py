"""Decides when the run is saved, and restores it. Connects the trainer's state with the checkpoint store."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..account.keeper import Account
from ..checkpoint import CheckpointStore, RetentionPolicy
from ..checkpoint.best import parse_best
from ..checkpoint.format.layout import step_name
from ..checkpoint.retention import policies_of
from ..errors import CheckpointError, check_int, check_interval, describe
from ..hook import CheckpointerHook
from ..paths import parse_absolute_path, parse_path, placed
from ..ranks import collectives
from ..ranks.control import check_main_thread, exit_cause, parse_signals
from ..records import Records, flatten_nested_dict, is_number
from ..state.pretrained import texts_beside
from ..state.restoring import Source, restore_from
from ..state.resuming import parse_on_resume, settings_to_save
from ..state.saved import content_of
from .metrics import tell_missing_metrics
from .save_timing import SaveTiming

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


class CheckpointingHook(CheckpointerHook):
    """Saves the whole run every `interval` steps and at its end, and resumes it exactly.

    A checkpoint is committed by one rename, after all its files are on the disk. Until then the older ones stay. The
    newest checkpoint and the newest healthy one (all parameters finite) are never removed. The metrics of a checkpoint
    are the numbers that were logged since the last commit, including those of an evaluation at the same step. `BestK`
    and `python -m trainloop checkpoints ls` use them.

    Args:
        interval: Optimizer steps between two saves. "epoch": save at the step that ends an epoch of the data.
        keep_previous: How many commits before the newest to keep.
        keep_interval: Keep steps that are multiples of this. 0: none.
        path: Folder, relative to the trainer's `workspace`.
        load: "latest": resume from the newest healthy checkpoint of all `CheckpointingHook`s with this setting, and
            start fresh only if there is none. "best:val/loss" or "best:val/accuracy:max": load the checkpoint in this
            hook's folder with the best value of a metric, again at every start. A step. A path, also of a checkpoint of
            another tool (`accelerator.save_state` or `save_model`, the trainer's origin, weights); the log says what
            can't be loaded from it. Pickles are read with `weights_only=True`. None: start fresh.
        exit_signals: Signals, by number or name, at which all ranks save after the same step and exit.
        exit_code: Exit code after such a signal. "128+signal": as a shell does.
        exit_wait: Seconds to wait before this exit.
        keep_steps: Keep these steps.
        keep: More policies, from `trainloop.checkpoint`.
        save_every: Also save when this time has passed since the last save, by rank 0's clock. "auto": the interval
            that loses the least time, computed from the cost of saves and the frequency of failures.
        deadline: When the run must be over: a timedelta from the start of the process, a datetime, or "slurm" for the
            end of the Slurm job. All ranks save early enough to finish before it, and exit as after SIGTERM.
        async_save: True: only the copy of the tensors blocks; a thread writes. Final saves always finish.
        verify: How a checkpoint is checked before it is loaded: "full", "size" or "off".
        on_busy: If a save is due while an async save still runs: "wait" for that one, or "skip" the new one.
        max_failures: How many saves in a row may fail before the run ends.
        on_resume: Names of what the script overrides in the checkpoint. "hyperparameters": the optimizer's learning
            rate, weight decay and other group settings. "lr_scheduler": the schedule, moved to the run's step.
            "optimizer": both, with a fresh optimizer state. "data": the data starts at its first epoch. "stop": a
            stopped run continues. By default the checkpoint wins, and a table in the log shows the differences. A name
            applies once: when it is new, or when its settings have changed again. So you can repeat the command.
        ledger: Record the bits of each step in the workspace, and compare the steps that a resumed run repeats.
        trainable_only: Leave out the frozen parameters, which `build_model` must provide again. The manifest has their
            names, shapes and fingerprints, and a resume raises if `build_model` provides others. Buffers are saved, and
            so are frozen parameters that have changed since the model was built.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        interval: int | str,
        keep_previous: int = 0,
        keep_interval: int = 0,
        path: Path | str = "checkpoints",
        load: str | int | Path | None = "latest",
        exit_signals: Iterable[int | str] | int | str | None = None,
        exit_code: int | str = "128+signal",
        exit_wait: float = 0.0,
        *,
        keep_steps: Sequence[int] = (),
        keep: Sequence[RetentionPolicy] = (),
        save_every: timedelta | str | None = None,
        deadline: timedelta | datetime | str | None = None,
        async_save: bool = False,
        verify: str = "full",
        on_busy: str = "wait",
        max_failures: int = 3,
        on_resume: Iterable[str] | str = (),
        ledger: bool = True,
        trainable_only: bool = False,
    ) -> None:
        check_interval("interval", interval)
        for name, value, lowest in (
            ("keep_previous", keep_previous, 0),
            ("keep_interval", keep_interval, 0),
            ("max_failures", max_failures, 0),
        ):
            check_int(name, value, lowest)
        if isinstance(load, bool) or not (load is None or isinstance(load, str | int | Path)):
            raise TypeError(f'`load` must be "latest", "best:METRIC", a step, a path or None, but is {describe(load)}.')
        if exit_code != "128+signal" and (isinstance(exit_code, bool) or not isinstance(exit_code, int)):
            raise TypeError(f'`exit_code` must be an integer or "128+signal", but is {describe(exit_code)}.')
        for name, choice, choices in (
            ("verify", verify, ("full", "size", "off")),
            ("on_busy", on_busy, ("wait", "skip")),
        ):
            if choice not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, but is {choice!r}.")
        self.interval = interval
        self.path = parse_path("path", path)
        self.needs_workspace = not self.path.is_absolute()
        if load is not None and load != "latest" and not isinstance(load, int) and parse_best(load) is None:
            load = parse_absolute_path("load", load)
        self.load = load
        self.exit_signals = parse_signals("exit_signals", exit_signals)
        self.exit_code = exit_code
        self.exit_wait = exit_wait
        self.timing = SaveTiming(save_every, deadline)
        self.async_save = async_save
        self.verify: Any = verify
        self.on_busy = on_busy
        if not isinstance(trainable_only, bool):
            raise TypeError(f"`trainable_only` must be True or False, but is {describe(trainable_only)}.")
        self.trainable_only = trainable_only
        self.max_failures = max_failures
        self.ledger = ledger
        self.on_resume = parse_on_resume(on_resume)
        self._retention = policies_of(keep_previous, keep, keep_interval, keep_steps)
        self._store: CheckpointStore | None = None
        self._account: Account | None = None  # one for all CheckpointingHooks of a run
        self._run_id = ""
        self._saved_step = -1
        self._has_saved = False
        self._num_failures = 0
        self._is_settled = True
        self._has_looked = False
        self._metrics: dict[str, Any] = {}
        self._previous_handlers: dict[int, Any] = {}

    # ------------------------------------------------------------------ resume

    def restore(self, trainer: BaseTrainer) -> dict[str, Any] | None:
        hooks = [hook for hook in trainer.checkpointers if isinstance(hook, CheckpointingHook)]
        if self is not hooks[0]:
            return None  # the first hook has looked for all of them
        for hook in hooks:
            hook._open(trainer)
        self._begin_account(trainer)
        sources = [Source(hook._opened, hook.load, hook.verify, hook.on_resume) for hook in hooks]
        restored = restore_from(trainer, sources)
        for hook in hooks:
            hook._run_id = restored.run_id
            if hook._opened is restored.store:
                hook._saved_step = trainer.step
        return restored.state_dict

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self._open(trainer)
        self._begin_account(trainer)
        self._kept.start()
        self.timing.begin(trainer, self._opened)
        if self.exit_signals:
            check_main_thread("exit_signals")
        for number in self.exit_signals:
            # The handler only records the signal. All ranks agree on it within the next window.
            previous = signal.signal(number, lambda received, frame: trainer.control.ask("exit_signal", received))
            self._previous_handlers.setdefault(number, previous)

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if self._store is not None and self._store.failed():
            trainer.control.ask("save_failed")  # all ranks learn of it at the end of this step

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do."""
        return [(f"save into {(workspace / self.path).resolve()}", "path")]

    def saves_to(self, trainer: BaseTrainer) -> Path:
        return placed(trainer, self.path)

    def _open(self, trainer: BaseTrainer) -> None:
        if self._store is None:
            hooks = [hook for hook in trainer.checkpointers if isinstance(hook, CheckpointingHook)]
            self._store = CheckpointStore(
                self.saves_to(trainer),
                logger=trainer.logger,
                timeout=collectives.timeout(),
                clock=next((hook._store.clock for hook in hooks if hook._store is not None), None),
            )
            self._store.open()

    @property
    def _opened(self) -> CheckpointStore:
        assert self._store is not None
        return self._store

    def _begin_account(self, trainer: BaseTrainer) -> None:
        if self._account is None:
            hooks = [hook for hook in trainer.checkpointers if isinstance(hook, CheckpointingHook)]
            account = Account(trainer, keeps_ledger=all(hook.ledger for hook in hooks))
            for hook in hooks:
                hook._account = account

    @property
    def _kept(self) -> Account:
        assert self._account is not None
        return self._account

    def note_losses(self, first_step: int, losses: Sequence[float]) -> None:
        self._kept.note_losses(first_step, losses)

    # ------------------------------------------------------------------ save

    def save_if_due(self, trainer: BaseTrainer) -> None:
        self._kept.after_step()
        agreed = trainer.control.agreed
        if trainer.control.take("save_failed"):
            self._settle(trainer)
        exit_signal = agreed["exit_signal"]
        is_final = bool(exit_signal or trainer.is_finished)
        is_asked = bool(trainer.control.take("checkpoint"))
        if is_final or is_asked or trainer.is_due(self.interval):
            self._save(trainer, is_final)
        elif self.timing.is_due(trainer):
            trainer.request_checkpoint()
        if exit_signal:
            self._exit(trainer, exit_signal)

    def _save(self, trainer: BaseTrainer, is_final: bool) -> None:
        if trainer.step == self._saved_step:
            return
        runs_in_thread = self.async_save and not is_final
        if runs_in_thread and self.on_busy == "skip" and any(collectives.start_max([self._opened.busy()])()):
            trainer.logger.info(f"Step {trainer.step}: the previous save is still being written. This one is skipped.")
            return
        self.timing.save_begins()
        self._settle(trainer, is_final)
        save = self._opened.save_async if runs_in_thread else self._opened.save
        try:
            content = content_of(trainer, self._run_id, not self._has_saved, self.trainable_only)
            save(
                trainer.step,
                content,
                run_id=self._run_id,
                metrics={name: float(value) for name, value in self._metrics.items()},
                settings={**settings_to_save(trainer, self.on_resume), **self._kept.counts()},
                stopped_by=trainer.control.who_stopped(),
                retention=self._retention,
                extra=texts_beside(trainer.unwrapped_model, content.weights, is_partial=bool(content.frozen)),
            )
        except CheckpointError as ex:
            if is_final:
                raise
            self._count_failure(trainer, ex)
        else:
            seconds = self.timing.save_returned(is_durable=not runs_in_thread)
            self._kept.saved(seconds, is_durable=not runs_in_thread)
            self._saved_step, self._has_saved = trainer.step, True
            if not self._has_looked and collectives.rank() == 0:
                logged = {*self._metrics, *(name for info in self._opened.checkpoints() for name in info.metrics)}
                self._has_looked = tell_missing_metrics(trainer, self._retention, logged)
            self._metrics = {}
            self._is_settled = not runs_in_thread
            if self._is_settled:
                self._num_failures = 0

    def _settle(self, trainer: BaseTrainer, is_final: bool = False) -> None:
        """Wait for the last async save and learn its result. Even if it has failed, a final save must still happen."""
        try:
            self._opened.wait()
        except CheckpointError as ex:
            self._saved_step = -1
            self._count_failure(trainer, ex, is_final)
        else:
            if not self._is_settled:
                self._kept.durable(self._saved_step, self._opened.last_seconds)
                self._num_failures = 0
        self._is_settled = True

    def _count_failure(self, trainer: BaseTrainer, error: CheckpointError, is_final: bool = False) -> None:
        self._num_failures += 1
        self._kept.save_failed(trainer.step, error)
        if self._num_failures > self.max_failures and not is_final:
            raise error
        trainer.logger.error(
            f"Step {trainer.step}: a save failed ({self._num_failures} in a row, at most {self.max_failures} may)."
            f" Training continues. {error}"
        )

    def on_log(self, trainer: BaseTrainer, records: Records, dry_run: bool) -> None:
        """Keep the numbers that are logged: they become the metrics of the next checkpoint."""
        if (trainer.dry_run or not dry_run) and collectives.rank() == 0:
            for key, value in flatten_nested_dict(records).items():
                if is_number(value):
                    self._metrics["/".join(map(str, key))] = value

    def _exit(self, trainer: BaseTrainer, exit_signal: int) -> None:
        name, why, usual_code = exit_cause(exit_signal)
        code = usual_code if isinstance(self.exit_code, str) else self.exit_code
        text = f"{why}: saved after step {trainer.step} in {self._opened.path}, exiting with code {code}."
        trainer.logger.warning(f"{text}{' Start the same command again to continue.' * (self.load == 'latest')}")
        self._kept.ends_by("signal" if name else "deadline", name)
        time.sleep(self.exit_wait)
        end = SystemExit(code)
        end.add_note(text)  # for the launcher's summary
        raise end  # `on_exception` closes; until then the handler stays, and another signal is only recorded

    def on_after_train(self, trainer: BaseTrainer) -> None:
        stopped_by = trainer.control.who_stopped()
        self._close()
        self._end_account(stopped_by=stopped_by)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        store, is_latest = self._store, self.load == "latest"
        try:
            self._close()  # waits for the save in flight; the threads of all ranks finish it without this one
        except CheckpointError as ex:  # logged, because it must not replace the exception that ended the run
            trainer.logger.error(f"Step {trainer.step}: {ex}")
        if store is not None and is_latest and not isinstance(exception, SystemExit):
            folders = [step_name(info.step) for info in store.checkpoints() if info.health]
            start = f"continues from {store.path / folders[-1]}" if folders else "starts over: there is no checkpoint"
            trainer.logger.info(f"The run ended after step {trainer.step}. The next start {start}.")
        self._end_account(exception)

    def _end_account(self, exception: BaseException | None = None, stopped_by: str = "") -> None:
        account, self._account = self._account, None
        if account is not None:
            account.end(exception, stopped_by)

    def _close(self) -> None:
        store, self._store = self._store, None
        try:
            if store is not None:
                store.close()
                if not self._is_settled and self._account is not None:
                    self._account.durable(self._saved_step, store.last_seconds)
        finally:
            for number, previous in self._previous_handlers.items():
                signal.signal(number, previous)
            self._previous_handlers.clear()
