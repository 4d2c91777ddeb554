"""Runs one life of a run: real processes, one per rank, which end by themselves or by a real signal.

They are forked from a server that has only imported torch and trainloop. So a life costs tenths of a second, but each
process is a new one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..ranks.lost_contact import is_lost_contact
from .comparison import flat
from .kills import KillAt
from .witness import UnfitError, Witness

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_PRELOADED = [
    __name__,
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.checkpoint.state_dict",  # this and the next ones: a run imports them when it needs them
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]
_LAUNCH_VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "OMP_")
_FAILED = 1
"""Exit code of a process that an exception has ended."""
_LOST_CONTACT = 3
"""Exit code of a process that has failed because another one is gone."""
_SECONDS_FOR_THE_OTHER = 10.0
"""How much longer that other process may take to end than those that lost contact with it."""


def live(
    make_trainer: Callable[[Path], BaseTrainer],
    workspace: Path,
    kill: KillAt | None = None,
    *,
    num_processes: int = 1,
    env: Mapping[str, str] | None = None,
    record: Callable[[Any], Any] | None = None,
    timeout: float = 300.0,
) -> list[int | None]:
    """Run one life, to its end or to `kill`. Its files outside of the workspace are beside it, see `path_prefix`.

    Args:
        make_trainer: Makes the trainer for `workspace`. It is sent to the processes.
        workspace: The run's workspace.
        kill: Where this life ends. None: at the end of the run.
        num_processes: Number of processes in this life.
        env: From `launch_environment`. None: its result without launch arguments.
        record: Returns what is recorded of a micro-batch.
        timeout: In seconds.

    Returns:
        How each rank ended, as in `multiprocessing`: -signal or the exit code. None: it was ended from outside, because
        the killed process is gone.

    Raises:
        ValueError: The trainer is not suitable, or the kill never happened.
        RuntimeError: The life ended in an unexpected way, or did not end.
    """
    if not hasattr(signal, "SIGKILL"):
        raise RuntimeError("To kill a run, a POSIX system is needed: this one has no SIGKILL.")
    number = 1 + sum(1 for _ in workspace.parent.glob(f"{workspace.name}.life*.rank0.log"))
    prefixes = [path_prefix(workspace, number, rank) for rank in range(num_processes)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    environment, port = dict(launch_environment(num_processes) if env is None else env), str(_free_port())
    processes = []
    for rank in range(num_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        if num_processes > 1:
            environment |= {**{k: str(v) for k, v in place.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        kill_here = kill if kill is not None and kill.rank == rank else None
        start_method = multiprocessing.get_start_method()
        args = (make_trainer, workspace, kill_here, record, dict(environment), start_method, prefixes[rank])
        processes.append(context.Process(target=_live, args=args, name=prefixes[rank]))
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        codes: list[int | None] = [None] * num_processes
        while None in codes and time.monotonic() < end:
            time.sleep(0.005)
            was_lost, codes = _LOST_CONTACT in codes, [process.exitcode for process in processes]
            if _FAILED in codes or -signal.SIGKILL in codes:
                break  # the others may wait for it forever
            if _LOST_CONTACT in codes and not was_lost:
                end = min(end, time.monotonic() + _SECONDS_FOR_THE_OTHER)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    is_killed = kill is not None and any("killed" in row for row in read_notes(prefixes[kill.rank]))
    if kill is not None and is_killed and codes[kill.rank] not in (None, _FAILED, _LOST_CONTACT):
        return codes
    if codes != [0] * num_processes:
        raise _unexpected(codes, prefixes, number)
    if kill is not None:
        count = Path(f"{prefixes[kill.rank]}.count").read_text()
        raise ValueError(
            f"{kill} never happened: life {number} of the run began after step {start_step(prefixes[kill.rank])} and"
            f" came to its end. From step {kill.step} on, rank {kill.rank} has met {kill.event} {count} times."
        )
    return codes


def path_prefix(workspace: Path, number: int, rank: int) -> str:
    """The start of the paths of the files that a process writes.

    The files are `.jsonl` (its notes), `.log` (its output), and `.pt` (its state, if it reached its end).
    """
    return f"{workspace}.life{number:03d}.rank{rank}"


def read_notes(prefix: str) -> list[dict[str, Any]]:
    """The notes of a process."""
    try:
        lines = Path(f"{prefix}.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]  # the last line may be cut off


def start_step(prefix: str) -> int:
    """The step after which a process began."""
    return max((int(row["start"]) for row in read_notes(prefix) if "start" in row), default=0)


def launch_environment(num_processes: int, launch_args: Sequence[str] = ()) -> dict[str, str]:
    """This process's environment, with the variables that `accelerate launch` adds. `accelerate launch` is run for it.

    Raises:
        ValueError: `accelerate launch` does not accept `launch_args`.
    """
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env.setdefault("ACCELERATE_USE_CPU", "true")
    env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    if not launch_args:
        return env
    with tempfile.TemporaryDirectory() as folder:
        script, variables = Path(folder, "write.py"), Path(folder, "variables.json")
        script.write_text(
            "import json, os, sys\n"
            "if os.environ.get('RANK', '0') == '0': json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
        )
        options = ["--num_processes", str(num_processes)]
        if num_processes > 1:
            options += ["--main_process_port", str(_free_port())]
        arguments = [*launch_args, *options, str(script), str(variables)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"`launch_args` must be options of `accelerate launch`, which says:\n{done.stderr[-2000:]}"
            )
        launched = json.loads(variables.read_text())
    return env | {name: value for name, value in launched.items() if name.startswith(_LAUNCH_VARIABLES)}


def _live(
    make_trainer: Callable[[Path], BaseTrainer],
    workspace: Path,
    kill: KillAt | None,
    record: Callable[[Any], Any] | None,
    env: dict[str, str],
    start_method: str,
    prefix: str,
) -> None:
    """The function that each process runs."""
    multiprocessing.set_start_method(start_method, force=True)  # for a loader's workers, as in a script
    os.environ.clear()
    os.environ.update(env)
    log = os.open(f"{prefix}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # because torch was imported before the variable was set
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        trainer = make_trainer(workspace)
        if trainer.seed is None:
            raise UnfitError("`make_trainer` must give the trainer a `seed`, or no two runs are the same.")
        witness = Witness(trainer, Path(f"{prefix}.jsonl"), kill, record)
        trainer.train()
    except UnfitError as ex:
        Path(f"{prefix}.unfit").write_text(str(ex))
        raise
    except Exception as ex:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_LOST_CONTACT if is_lost_contact(ex) else _FAILED)  # skips exit handlers, which wait for other ranks
    state = {**trainer.live_state_dict(), "buffers": dict(trainer.unwrapped_model.named_buffers())}
    torch.save(flat({**state, "logged": witness.after_train}), f"{prefix}.pt")
    Path(f"{prefix}.count").write_text(str(witness.count))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _unexpected(codes: Sequence[int | None], prefixes: Sequence[str], number: int) -> Exception:
    for prefix in prefixes:
        if Path(f"{prefix}.unfit").exists():
            return ValueError(Path(f"{prefix}.unfit").read_text())
    guilty = max(range(len(codes)), key=lambda rank: _guilt(codes[rank]))
    how = "did not end in time" if codes[guilty] is None else f"ended with exit code {codes[guilty]}"
    output = Path(f"{prefixes[guilty]}.log").read_text()[-4000:]
    return RuntimeError(f"Rank {guilty} in life {number} of the run {how}. It printed:\n{output}")


def _guilt(code: int | None) -> int:
    """How much a process's exit code says about the cause: most if it has its own exception, less if it hangs, least if
    it lost contact with another process. The output of the process with the highest value is shown.
    """
    return {0: 0, _LOST_CONTACT: 1, None: 2}.get(code, 3)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
