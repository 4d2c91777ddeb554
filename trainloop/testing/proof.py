"""Proves for a user's trainer what our tests prove for ours. This is the work of `trainloop prove`.

```
1 process      uninterrupted, and killed twice and resumed   every step and the end, bit by bit
N processes    uninterrupted, and killed twice and resumed   the same
1 process      with N times the accumulation                 learning rates, losses and gradients of N processes
```
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..account.events import read_events
from ..checkpoint.format.catalog import Catalog
from .comparison import differences
from .kills import KillAt
from .lives import launch_environment, live, path_prefix, read_notes, start_step
from .resume import MEASURED, compare
from .subject import Subject, batch_checksum, measured_file

STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp2": (
        "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP",
        "--fsdp_cpu_ram_efficient_loading", "false",
    ),
}  # fmt: skip
"""Options of `accelerate launch`, by the name of the strategy."""
MIN_STEPS = 6
_TOLERANCE = {"no": (1e-4, 2e-2)}
_LOW_TOLERANCE = (5e-2, 2e-1)
"""Relative tolerances for losses and norms in the first step and in later steps: the sums have another order."""
_RUNS = {"whole": "the run undisturbed", "killed": "the run in several lives", "again": "the run undisturbed, again"}


@dataclass(frozen=True)
class Check:
    """One property to be shown."""

    name: str
    is_held: bool
    text: str
    """What was observed. For a failure: where and why, as far as known."""


@dataclass(frozen=True)
class Proof:
    """The result of a proof."""

    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def is_held(self) -> bool:
        """Whether all properties were shown."""
        return all(check.is_held for check in self.checks)


def prove(
    subject: Subject,
    folder: Path,
    *,
    num_processes: int = 2,
    strategy: str = "ddp",
    launch_args: Sequence[str] = (),
    timeout: float = 600.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Proof:
    """Do the runs, and compare them.

    Args:
        subject: The trainer.
        folder: The folder for the runs.
        num_processes: N.
        strategy: Strategy of the N processes, from `STRATEGIES`.
        launch_args: More options of `accelerate launch`.
        timeout: Limit for one life, in seconds.
        tell: Called with a text about the next action.

    Raises:
        ValueError: The trainer cannot be made, or `accelerate launch` does not accept the options.
    """
    proof = Proof()
    names = {1: "1 process"}
    if num_processes > 1:
        names[num_processes] = f"{num_processes} processes ({strategy.upper()})"
    for number, name in names.items():
        env = launch_environment(number, [*(STRATEGIES[strategy] if number > 1 else ()), *launch_args])
        lives = _Lives(subject, folder / f"on_{number}", number, env, timeout, tell, name)
        proof.checks.append(_guarded(f"{name}: killed twice and resumed", lives.prove_resume))
        if measured := lives.measured("whole"):
            proof.numbers[name] = _numbers(lives, measured)
        if number == 1:
            single_env = env
        elif measured:
            single = replace(subject, accumulate=subject.accumulate * number)
            one = _Lives(single, folder / "as_one", 1, single_env, timeout, tell, f"1 process, accumulation x {number}")
            show = partial(_compare_training, one, measured)
            proof.checks.append(_guarded(f"1 and {name}: the same training", show))
    return proof


def _guarded(name: str, show: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *show())
    except RuntimeError as ex:  # a life has failed without a kill
        return Check(name, False, str(ex))


@dataclass(frozen=True)
class _Lives:
    """Runs of one trainer with one number of processes."""

    subject: Subject
    folder: Path
    num_processes: int
    env: Mapping[str, str]
    timeout: float
    tell: Callable[[str], None]
    name: str

    def run(self, run: str, kill: KillAt | None = None, *, is_async: bool | None = False) -> None:
        """Run one life of the run with this name."""
        until = f", killed at step {kill.step}" if kill is not None else ""
        self.tell(f"{self.name}: {_RUNS[run]}{until}")
        self.folder.mkdir(parents=True, exist_ok=True)
        live(
            replace(self.subject, is_async=is_async),
            self.folder / run,
            kill,
            num_processes=self.num_processes,
            env=self.env,
            record=batch_checksum,
            timeout=self.timeout,
        )

    def measured(self, run: str) -> list[dict[str, Any]]:
        """The measurements of each rank. Empty: the run did not reach its end."""
        paths = [measured_file(self.folder / run, rank) for rank in range(self.num_processes)]
        return [json.loads(path.read_text()) for path in paths] if all(path.exists() for path in paths) else []

    def prove_resume(self) -> tuple[bool, str]:
        """Whether a killed run finishes like an uninterrupted one."""
        interval = self.subject.interval
        kills = [
            KillAt(interval + 2, "on_after_step", rank=self.num_processes - 1),
            KillAt(2 * interval, "write"),
        ]
        self.run("whole", is_async=None)
        for kill in [*kills, None]:
            self.run("killed", kill)
        whole, killed = self.folder / "whole", self.folder / "killed"
        try:
            compare(whole, killed, kills, self.num_processes, ())
        except AssertionError as ex:
            return False, f"{ex}\n{self._cause(whole, killed, len(kills) + 1)}"
        done = ", ".join(f"{kill.step} ({kill.event})" for kill in kills)
        return True, f"killed at steps {done}: every step and the state at the end are the same, bit by bit"

    def _cause(self, whole: Path, killed: Path, num_lives: int) -> str:
        self.run("again")
        if (found := first_difference(whole, self.folder / "again", 1, self.num_processes)) is not None:
            return (
                f"Two runs that nobody disturbed differ as well, first in step {found.step}, so the resume is not the"
                " cause. Something draws random numbers from a generator that the seed does not reach, depends on the"
                f" time, or a kernel is not deterministic (see `deterministic=True`). {found.text()}"
            )
        found = first_difference(whole, killed, num_lives, self.num_processes)
        if found is None:
            return (
                "All steps are the same, but not the state at the end. Look for what changes weights or state without"
                " being saved: an attribute of a hook that `on_state_dict` does not save."
            )
        return f"{found.text()} {found.meaning()}"


@dataclass(frozen=True)
class StepDifference:
    """The first step in which two runs differ."""

    step: int
    start: int
    """The step that the life resumed from."""
    rank: int
    paths: Sequence[str]
    """One sentence per entry that differs."""

    def text(self) -> str:
        """Where and what the difference is."""
        return f"Step {self.step} on rank {self.rank}, {self.step - self.start} after the resume: {self.paths[0]}."

    def meaning(self) -> str:
        """A probable cause."""
        kinds = {path.split("/")[0].split(" ")[0] for path in self.paths}
        if "recorded" in kinds:
            return (
                "The samples themselves differ. The data set or its collate function draws from a generator that is not"
                " saved (one of its own, or a module's): use torch's, numpy's or Python's global one."
            )
        if "lr" in kinds:
            return "The learning rate differs: something sets it besides the schedule, by a count that is not saved."
        if kinds <= {"logged"}:
            return (
                "The training is the same, only what is logged is not: a hook counts or averages in an attribute that"
                " its `on_state_dict` does not save."
            )
        if self.step == self.start + 1 and "losses" in kinds:
            return (
                "The samples are the same and the loss of the first step is not: `forward` depends on something that a"
                " checkpoint does not have, as an attribute of the trainer or a generator of its own. Save it in a"
                " hook's `on_state_dict`."
            )
        return (
            "Samples and learning rate are the same, and the first steps after the resume were: the update depends on"
            " something that a checkpoint does not have, as a count in a hook. Save it in `on_state_dict`."
        )


def first_difference(whole: Path, other: Path, num_lives: int, num_processes: int) -> StepDifference | None:
    """The first step of any life of `other` that differs from `whole`, on any rank."""
    found: list[StepDifference] = []
    for rank in range(num_processes):
        expected = {row["step"]: row for row in read_notes(path_prefix(whole, 1, rank)) if "step" in row}
        for number in range(1, num_lives + 1):
            prefix = path_prefix(other, number, rank)
            for row in read_notes(prefix):
                if "step" in row and (paths := list(differences(expected.get(row["step"], {}), row, MEASURED))):
                    found.append(StepDifference(row["step"], start_step(prefix), rank, paths))
                    break
    return min(found, key=lambda one: (one.step, one.rank), default=None)


def _compare_training(one: _Lives, several: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether one process with more accumulation trains like several processes."""
    one.run("whole")
    (single,) = one.measured("whole")
    strict, loose = _TOLERANCE.get(single["precision"], _LOW_TOLERANCE)
    draws = single["draws"] or any(rank["draws"] for rank in several)
    largest = {"loss": 0.0, "grad_norm": 0.0}
    for step in sorted(single["steps"], key=int):
        ours, theirs = single["steps"][step], [rank["steps"][step] for rank in several]
        if any(rank["lr"] != ours["lr"] for rank in theirs):
            return (
                False,
                f"step {step}: the learning rates are {ours['lr']} in one process and {theirs[0]['lr']} in several",
            )
        if draws:
            continue
        others = {"loss": statistics.fmean(rank["loss"] for rank in theirs), "grad_norm": theirs[0]["grad_norm"]}
        for quantity, value in others.items():
            deviation = _deviation(ours[quantity], value)
            largest[quantity] = max(largest[quantity], deviation)
            if not deviation <= (strict if int(step) == 1 else loose):
                return False, (
                    f"step {step}: the {_NAMES[quantity]} is {ours[quantity]:.7g} in one process and {value:.7g} in"
                    f" {len(several)}, {deviation:.1e} apart. {_advice(int(step))}"
                )
    if draws:
        return True, (
            "the same learning rates; losses and gradients were not compared, because `forward` draws random numbers,"
            " which are others on each rank (dropout, for example)"
        )
    return True, (
        f"the same learning rates; losses differ by at most {largest['loss']:.1e} and gradient norms by"
        f" {largest['grad_norm']:.1e} (relative), because the sums have another order"
    )


_NAMES = {"loss": "loss", "grad_norm": "gradient norm"}


def _advice(step: int) -> str:
    if step > 1:
        return (
            "The first steps agree, so small differences grow quickly, or something in the update depends on the rank."
        )
    return (
        "Look for a loss that is not a mean over the samples, batches of unequal weight without `batch_weight`, or a"
        " `forward` that depends on the rank or the size of the batch."
    )


def _deviation(a: float, b: float) -> float:
    scale = max(abs(a), abs(b))
    return abs(a - b) / scale if scale > 0 else 0.0 if a == b else math.inf


def _numbers(lives: _Lives, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The measurements in the uninterrupted run."""
    events = read_events(lives.folder / "whole")
    saves = [event for event in events if event["event"] == "save"]
    whole = [event["seconds"] for event in events if event["event"] == "durable" or event.get("durable")]
    folders = [path for path in (lives.folder / "whole").rglob("step_*") if path.is_dir()]
    sizes = [info.num_bytes for folder in {path.parent for path in folders} for info in Catalog(folder).infos()]
    steps = sorted(ranks[0]["steps"], key=int)[1:] or list(ranks[0]["steps"])  # without the first one, the warm-up
    seconds = statistics.median(max(rank["steps"][step]["seconds"] for rank in ranks) for step in steps)
    samples = statistics.median(sum(rank["steps"][step]["samples"] for rank in ranks) for step in steps)
    return {
        "save_bytes": max(sizes, default=0),
        "save_blocked_seconds": statistics.median(event["seconds"] for event in saves) if saves else None,
        "save_whole_seconds": statistics.median(whole) if whole else None,
        "peak_memory_bytes": max(rank["memory"] for rank in ranks),
        "peak_device_memory_bytes": max(rank["device_memory"] or 0 for rank in ranks) or None,
        "step_seconds": seconds,
        "samples_a_second": samples / seconds if seconds > 0 else None,
        "device": ranks[0]["device"],
        "precision": ranks[0]["precision"],
    }
