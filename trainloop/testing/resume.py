"""Proves that a killed and resumed run finishes like an uninterrupted one.

```
assert_resume_exact ─► the run, uninterrupted            one life
                       the run, killed again and again   a life for each kill, and one to the end
                    ─► every step of every life, and the state at the end, bit by bit
```
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import describe
from .comparison import differences
from .kills import KillAt
from .lives import launch_environment, live, path_prefix, read_notes, start_step

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

MEASURED = ("*step_time*", "*data_time*", "*max_memory*")  # measurements of our own hooks; they always differ
_NUM_TOLD = 5


def assert_resume_exact(
    make_trainer: Callable[[Path], BaseTrainer],
    kill_at: Sequence[KillAt],
    *,
    num_processes: int = 1,
    launch_args: Sequence[str] = (),
    record: Callable[[Any], Any] | None = None,
    ignore: Sequence[str] = (),
    workspace: Path | str | None = None,
    timeout: float = 300.0,
) -> None:
    """Assert that a killed run finishes bit-for-bit identical to an uninterrupted one.

    The run is done twice: once uninterrupted, and once in several lives. Each life resumes from the disk and ends at
    the next entry of `kill_at`; the last one runs to the end. On every rank, these are compared:

    - at each step of each life: losses, gradient norm, learning rates, logged records, and the results of `record`;
    - at the end: model, buffers, optimizer, scheduler, scaler, random generators, data position, and the state of the
      hooks.

    Needs a POSIX system. In a script, guard the call with `if __name__ == "__main__":`.

    Args:
        make_trainer: Makes a new trainer for the given `workspace`, with a `CheckpointingHook` and a `seed`. It is
            called in other processes, so it must be a function of a module, or a `functools.partial` of one.
        kill_at: Where the lives end, in this order.
        num_processes: Number of processes in a life; on the CPU if there is no GPU.
        launch_args: Options of `accelerate launch`, for example `["--use_fsdp", "--fsdp_version", "2"]` or
            `["--config_file", "launch.yaml"]`. The processes get the environment that it would give them.
        record: Called with each micro-batch before `forward`. Its results (nested numbers, strings, tensors) are
            compared. If it returns the ids of the samples, this shows that each is seen at the right time.
        ignore: Patterns of entries that may differ, with shell wildcards: `["*_seconds"]`. Time and memory that
            trainloop's own hooks measure are always ignored.
        workspace: Folder for the runs and the output of each process. None: a temporary folder, which is removed.
        timeout: Limit for one life, in seconds.

    Raises:
        AssertionError: Something differs. The message names the first entries, with both values.
        TypeError: An entry of `kill_at` is not a `KillAt`.
        ValueError: An argument is not usable, or nothing was shown: the trainer saves nothing, a kill never happened,
            or no kill came after a commit.
        RuntimeError: A process failed by itself, or hangs. The message contains its output.

    Example:
        ```python
        def make_trainer(workspace):
            return MyTrainer(max_steps=12, workspace=workspace, seed=0)  # its hooks: CheckpointingHook(interval=4), ...

        def test_my_trainer_resumes_exactly():
            kills = [KillAt(6, "on_after_step"), KillAt(8, "write"), KillAt(11, "on_before_optimizer_step")]
            assert_resume_exact(make_trainer, kills)
        ```
    """
    kills = list(kill_at)
    if not kills:
        raise ValueError("`kill_at` must hold at least one `KillAt`, but is empty.")
    for kill in kills:
        if not isinstance(kill, KillAt):
            raise TypeError(f"`kill_at` must hold `KillAt`s, but one is {describe(kill)}.")
        if kill.rank >= num_processes:
            raise ValueError(f"`rank` must be below `num_processes`, which is {num_processes}, but is not in {kill}.")
    env = launch_environment(num_processes, launch_args)
    run = partial(live, num_processes=num_processes, env=env, record=record, timeout=timeout)
    with tempfile.TemporaryDirectory() if workspace is None else nullcontext(workspace) as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        for path in (whole, killed):
            if path.exists():
                raise ValueError(f"`workspace` must be a folder without an earlier proof, but has {path}.")
        run(make_trainer, whole)
        for kill in kills:
            run(make_trainer, killed, kill)
        run(make_trainer, killed)
        compare(whole, killed, kills, num_processes, ignore)


def compare(whole: Path, killed: Path, kills: Sequence[KillAt], num_processes: int, ignore: Sequence[str]) -> None:
    """Compare a run in one life with the same run in several lives, by the files of `live`.

    Args:
        whole: Workspace of the first run.
        killed: Workspace of the second run, which was killed at each of `kills` and then ran to its end.
        kills: Where it was killed.
        num_processes: Number of processes in each life.
        ignore: See `assert_resume_exact`, also for the exceptions.
    """
    _check_worth(whole, killed, kills)
    for check in (_compare_steps, _compare_ends):
        for rank in range(num_processes):
            check(whole, killed, kills, rank, (*MEASURED, *ignore))


def _check_worth(whole: Path, killed: Path, kills: Sequence[KillAt]) -> None:
    """Raise if the lives can't have shown anything."""
    first = [start_step(path_prefix(run, 1, 0)) for run in (whole, killed)]
    if any(first):
        raise ValueError(
            f"A new run must start at step 0, but one started at step {max(first)}: `make_trainer` must use the"
            " `workspace` that it is given, for the checkpoints as well."
        )
    if not any(start_step(path_prefix(killed, number, 0)) for number in range(2, len(kills) + 2)):
        raise ValueError(
            "Nothing was shown: no life of the run went on from a checkpoint. Save more often than once before the"
            f" kills ({_listed(kills)}), and let CheckpointingHook load the latest."
        )


def _compare_steps(whole: Path, killed: Path, kills: Sequence[KillAt], rank: int, ignore: Sequence[str]) -> None:
    expected = {row["step"]: row for row in read_notes(path_prefix(whole, 1, rank)) if "step" in row}
    for number in range(1, len(kills) + 2):
        prefix = path_prefix(killed, number, rank)
        for row in read_notes(prefix):
            if "step" in row and (found := list(differences(expected.get(row["step"], {}), row, ignore))):
                where = f"at step {row['step']} of life {number}, which began after step {start_step(prefix)}"
                raise AssertionError(_message(where, rank, kills, found))


def _compare_ends(whole: Path, killed: Path, kills: Sequence[KillAt], rank: int, ignore: Sequence[str]) -> None:
    expected, got = (torch.load(f"{path_prefix(*life, rank)}.pt") for life in ((whole, 1), (killed, len(kills) + 1)))
    if found := list(differences(expected, got, ignore)):
        raise AssertionError(_message("in the state at the end", rank, kills, found))


def _message(where: str, rank: int, kills: Sequence[KillAt], found: Sequence[str]) -> str:
    more = f"\n  and {len(found) - _NUM_TOLD} more" if len(found) > _NUM_TOLD else ""
    listed = "".join(f"\n  {one}" for one in found[:_NUM_TOLD])
    return f"The run that was killed ({_listed(kills)}) differs on rank {rank} {where}:{listed}{more}"


def _listed(kills: Sequence[KillAt]) -> str:
    return ", ".join(f"{kill.event} from step {kill.step} on" for kill in kills[:3]) + (", ..." if kills[3:] else "")
