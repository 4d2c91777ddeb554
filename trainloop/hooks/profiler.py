"""Profiles some steps with torch's profiler, and reports what filled the memory when it ran out."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import ProfileKwargs

from ..account.step_lines import TEMPORARY, write_whole
from ..checkpoint.format.layout import step_name
from ..errors import check_int, describe
from ..hook import BaseHook
from ..paths import parse_path, placed
from ..ranks import collectives
from .out_of_memory import memory_report, out_of_memory_error
from .tracking import Guard

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_ACTIVITIES = ("cpu", "cuda", "xpu", "mtia", "hpu")
_MAX_ROWS = 40  # rows of the table
_MAX_HISTORY = 200_000  # number of allocations and frees that are kept


class ProfilerHook(BaseHook):
    """Profiles some steps of a run with `torch.profiler`, on every rank, and writes the results.

    The terms are torch's. A cycle is `wait` steps without the profiler, `warmup` steps whose result is dropped, and
    `active` steps that are recorded. Steps are counted from the first one of this `train`. Each cycle writes a Chrome
    trace for https://ui.perfetto.dev, `profiles/step_0000013/rank_00000.trace.json.gz`, and the table of the most
    expensive operators, `rank_00000.txt`; the folder has the number of the last recorded step. Outside the cycles the
    hook costs nothing, and the run's results stay the same, bit for bit.

    If memory runs out (`torch.OutOfMemoryError`), the rank writes a report,
    `profiles/out_of_memory_step_0000042_rank_00000.txt`: the step, the shapes of the batch and the largest tensors. On
    CUDA it writes a snapshot of the memory beside it, a `.pickle` for https://pytorch.org/memory_viz.

    Args:
        wait: Steps before each cycle's warm-up.
        warmup: Profiled steps whose result is dropped, because the first steps under the profiler are slower.
        active: Steps that are recorded.
        repeat: Number of cycles. 0: cycles until the run ends.
        skip_first: Steps before the first cycle.
        activities: What to record: some of "cpu", "cuda", "xpu", "mtia" and "hpu". None: all that torch supports here.
        record_shapes: Record the shapes of each operator's inputs.
        profile_memory: Record allocations in the trace.
        with_stack: Record each operator's line in the source. This makes the profiled steps slow.
        with_flops: Estimate the floating-point operations of matrix products and convolutions.
        memory_history: Record each allocation of CUDA memory with its stack, from the start of the run. Each cycle then
            writes a snapshot too. A snapshot shows which code allocated the memory. Costs the host a few microseconds
            per allocation.
        path: Folder, relative to the trainer's `workspace`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        wait: int = 10,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        skip_first: int = 0,
        *,
        activities: Sequence[str] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        memory_history: bool = False,
        path: Path | str = "profiles",
    ) -> None:
        lowest = {"wait": 0, "warmup": 0, "active": 1, "repeat": 0, "skip_first": 0}
        for (name, minimum), value in zip(lowest.items(), (wait, warmup, active, repeat, skip_first), strict=True):
            check_int(name, value, minimum)
        if activities is not None:
            if isinstance(activities, str) or not isinstance(activities, Sequence):
                raise TypeError(f"`activities` must be a list of names or None, but is {describe(activities)}.")
            wrong = [name for name in activities if name not in _ACTIVITIES]
            if wrong or not activities:
                found = f"one is {wrong[0]!r}" if wrong else "there are none"
                raise ValueError(f"`activities` must be names out of {_ACTIVITIES}, but {found}.")
        flags = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
            "with_flops": with_flops,
        }
        for name, flag in {**flags, "memory_history": memory_history}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"`{name}` must be True or False, but is {describe(flag)}.")
        self.wait, self.warmup, self.active, self.repeat, self.skip_first = wait, warmup, active, repeat, skip_first
        self.activities = list(activities) if activities is not None else None
        self.record_shapes, self.profile_memory = record_shapes, profile_memory
        self.with_stack, self.with_flops = with_stack, with_flops
        self.memory_history = memory_history
        self.path = parse_path("path", path)
        self.needs_workspace = not self.path.is_absolute()
        self._flags = flags
        self._profiler: Any = None
        self._first_step = 1  # the first step of this `train`
        self._begins = self._ends = -1  # first and last profiled step of the current or next cycle
        self._num_cycles = 0
        self._guard = Guard("ProfilerHook", "The profile is not there.")

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do."""
        return [("profile the run", "")]

    # ------------------------------------------------------------------ the cycles

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self._first_step, self._num_cycles = trainer.step + 1, 0
        self._begins = self._first_step + self.skip_first + self.wait
        if self.memory_history and trainer.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_MAX_HISTORY)
        elif self.memory_history:
            trainer.logger.warning(
                f"ProfilerHook records no memory history: the run is on {trainer.device.type}, and only CUDA has one."
            )

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if trainer.step != self._begins or self._profiler is not None:
            return
        self._ends = trainer.step + self.warmup + self.active - 1
        kwargs = ProfileKwargs(
            activities=self.activities,
            schedule_option={"wait": 0, "warmup": self.warmup, "active": self.active, "repeat": 1},
            on_trace_ready=partial(self._write, trainer),
            **self._flags,
        )
        profiler = kwargs.build()
        profiler.start()
        self._profiler = profiler

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if self._profiler is None:
            return
        self._profiler.step()
        if trainer.step >= self._ends:
            self._stop()
            self._num_cycles += 1
            is_last = self.repeat and self._num_cycles >= self.repeat
            self._begins = -1 if is_last else trainer.step + 1 + self.wait

    def on_after_train(self, trainer: BaseTrainer) -> None:
        self._stop()  # writes the steps recorded so far
        self._end_history(trainer)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        if self._profiler is not None:
            self._profiler.on_trace_ready = None
            self._guard.attempt(trainer, self._stop)
        error = out_of_memory_error(exception)
        if error is not None:
            self._guard.attempt(trainer, lambda: self._report(trainer, error, exception))
        self._end_history(trainer)

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _end_history(self, trainer: BaseTrainer) -> None:
        if self.memory_history and trainer.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    # ------------------------------------------------------------------ what is written

    def _folder(self, trainer: BaseTrainer) -> Path:
        return placed(trainer, self.path)

    def _write(self, trainer: BaseTrainer, profiler: Any) -> None:
        """Write the results of a cycle. Called on every rank after its last step."""
        folder, name = self._folder(trainer) / step_name(trainer.step), f"rank_{collectives.rank():05d}"

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            _export(folder / f"{name}.trace.json.gz", profiler.export_chrome_trace)
            by = "self_cpu_time_total" if trainer.device.type == "cpu" else "self_device_time_total"
            averages = profiler.key_averages(group_by_input_shape=self.record_shapes)
            table = averages.table(sort_by=by, row_limit=_MAX_ROWS, max_name_column_width=80)
            write_whole(folder / f"{name}.txt", table.encode())
            if self.memory_history:
                self.write_memory_snapshot(trainer, folder / f"{name}.pickle")
            trainer.logger.info(f"Step {trainer.step}: the profile of the last {self.active} steps is in {folder}.")

        self._guard.attempt(trainer, write, at_once=True)

    def write_memory_snapshot(self, trainer: BaseTrainer, file: Path) -> bool:
        """Write a snapshot of this rank's CUDA memory, for https://pytorch.org/memory_viz. Call on any rank.

        Args:
            trainer: The trainer.
            file: The file, a `.pickle`. It is complete or doesn't exist.

        Returns:
            Whether the run uses CUDA. Otherwise nothing is written.
        """
        if trainer.device.type != "cuda":
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        _export(file, torch.cuda.memory._dump_snapshot)
        return True

    def _report(self, trainer: BaseTrainer, error: torch.OutOfMemoryError, exception: BaseException) -> None:
        step = trainer.peers.step or trainer.step  # after an exception, `trainer.step` may be the step before
        name = f"out_of_memory_{step_name(step)}_rank_{collectives.rank():05d}"
        file = self._folder(trainer) / f"{name}.txt"
        report = memory_report(trainer, error, exception, step)
        write_whole(file, report.encode())
        has_snapshot = self.write_memory_snapshot(trainer, file.with_suffix(".pickle"))
        first_lines = "\n".join(report.splitlines()[:12])
        more = " The memory's snapshot is beside it." if has_snapshot else ""
        trainer.logger.error(f"{first_lines}\nThe whole report is {file}.{more}")


def _export(file: Path, export: Callable[[str], Any]) -> None:
    """Let `export` write a temporary file beside `file`, and rename it. torch chooses the format by the extension."""
    beside = file.with_name(f"{TEMPORARY}{uuid.uuid4().hex}{''.join(file.suffixes)}")
    try:
        export(str(beside))
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
