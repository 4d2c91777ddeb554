"""Proves that a run which is killed ends as one that is not.

```
assert_resume_exact ─► the run, undisturbed              one life
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

MEASURED = ("*step_time*", "*data_time*", "*max_memory*")  # by our own hooks, and never the same twice
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
    """Assert that a run which is killed ends with every bit of one that is not.

    The run is done twice: once undisturbed, and once in several lives. Each of these goes on from what the one before
    has left on the disk, and ends at the next of `kill_at`; the last one goes on to the end. Compared are, of every
    rank:

    - at each step of each life: losses, gradient norm, learning rates, what was logged, and what `record` gave;
    - at the end: model, buffers, optimizer, scheduler, scaler, random generators, data position, and what the hooks put
      into the state.

    Needs a POSIX system. A script guards the call with `if __name__ == "__main__":`.

    Args:
        make_trainer: Makes a new trainer, with a `CheckpointingHook` and a `seed`, for the `workspace` that it is
            given. It is called in other processes: a function of a module, or a `functools.partial` of one.
        kill_at: Where the lives end, in this order.
        num_processes: Processes of a life; without a GPU, on the CPU.
        launch_args: Options of `accelerate launch`, for example `["--use_fsdp", "--fsdp_version", "2"]` or
            `["--config_file", "launch.yaml"]`: the processes get the environment that it gives them.
        record: Called with each micro-batch before `forward`; what it returns (nested numbers, strings, tensors) is
            compared. With the ids of the samples it shows that each is seen when it should be.
        ignore: Patterns of entries that may differ, in the form of the shell: `["*_seconds"]`. Time and memory that
            trainloop's own hooks measure are always left out.
        workspace: Where the runs go, and what each process printed. None: a temporary folder, which is removed.
        timeout: Seconds that one life may take.

    Raises:
        AssertionError: Something differs. The message names the first entries, with both values.
        ValueError: An argument is of no use, or nothing was shown: the trainer saves nothing, a kill never happened, or
            none came after a commit.
        RuntimeError: A process failed by itself, or hangs. The message has what it printed.

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
    """Compare what `live` has left of a run in one life, and of the same run in several.

    Args:
        whole: Workspace of the first.
        killed: Workspace of the second, which was killed at each of `kills` and then came to its end.
        kills: Where.
        num_processes: Of each life.
        ignore: See `assert_resume_exact`, as for what is raised.
    """
    _check_worth(whole, killed, kills)
    for check in (_compare_steps, _compare_ends):
        for rank in range(num_processes):
            check(whole, killed, kills, rank, (*MEASURED, *ignore))


def _check_worth(whole: Path, killed: Path, kills: Sequence[KillAt]) -> None:
    """Raise if the lives have shown nothing."""
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
