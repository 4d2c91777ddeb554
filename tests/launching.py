"""Starts scripts as a user would: `accelerate launch`, real processes, gloo on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from trainloop.testing import lives

REPOSITORY = Path(__file__).parents[1]
COMMON = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
FSDP2 = [
    "--use_fsdp",
    "--fsdp_version", "2",
    "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP",
    "--fsdp_min_num_params", "50",
    "--fsdp_cpu_ram_efficient_loading", "false",
]  # fmt: skip

FORMS: dict[str, list[str]] = {
    "single": ["--num_processes", "1"],
    "ddp2": ["--multi_gpu", "--num_processes", "2"],
    "ddp3": ["--multi_gpu", "--num_processes", "3"],
    "fsdp1": [*FSDP2, "--num_processes", "1"],
    "fsdp2": [*FSDP2, "--num_processes", "2"],
    "fsdp3": [*FSDP2, "--num_processes", "3"],
    "hsdp2x2": [
        *FSDP2,
        "--num_processes", "4",
        "--use_parallelism_config",
        "--parallelism_config_dp_replicate_size", "2",
        "--parallelism_config_dp_shard_size", "2",
    ],
}  # fmt: skip
"""Launch arguments by the name of the form. The number is that of the processes; FSDP is version 2. `fsdp1` is for a
GPU: on a CPU, Accelerate makes a plain process of it."""

NUM_PROCESSES = {"single": 1, "ddp2": 2, "ddp3": 3, "fsdp1": 1, "fsdp2": 2, "fsdp3": 3, "hsdp2x2": 4}


PRELOADED = ["accelerate.commands.launch", *lives._PRELOADED]
"""What the server has imported from which `launch` and `trainloop.testing` fork; a process has one such server."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what Accelerate or pytest put there, and with the package importable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC", "PYTEST_"))}
    env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return env | extra


def command(script: Path, form: str, args: Sequence[str] = (), launch_args: Sequence[str] = ()) -> list[str]:
    """The command line that starts `script` in `form`. `launch_args` come last, so they win."""
    port = ["--main_process_port", str(free_port())] if form != "single" else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, *COMMON, *FORMS[form], *port, *launch_args, str(script), *args]


def launch(
    script: Path,
    form: str,
    *args: str,
    launch_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `script` in `form` to its end; with `check`, an exit code other than 0 fails with what it printed."""
    arguments = command(script, form, args, launch_args)[3:]  # without `python -m accelerate.commands.launch`
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run_launcher, args=(arguments, environment(**(env or {})), writer))
    with reader:
        process.start()
        writer.close()
        output = _read_to_end(reader.fileno(), time.monotonic() + timeout)
        if output is None:
            kill_tree(process.pid or 0)
            output = _read_to_end(reader.fileno(), time.monotonic() + 60) or ""
            raise AssertionError(f"{script.name} in form {form} hung for {timeout} s:\n{output[-4000:]}")
    process.join()
    code = process.exitcode or 0
    if check and code != 0:
        raise AssertionError(f"{script.name} in form {form} ended with {code}:\n{output[-6000:]}")
    return subprocess.CompletedProcess(arguments, code, output, "")


def written_by_ranks(
    form: str, out: Path, worker: Path, run: Callable[[Path], None], timeout: float = 240
) -> list[Any]:
    """What each rank of a worker writes into `out` as "RANK.json". A single process calls the worker's `run` here."""
    if form == "single":
        run(out)
    else:
        launch(worker, form, str(out), timeout=timeout)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES[form])]


def _run_launcher(arguments: list[str], env: dict[str, str], output: Connection) -> None:
    """What `python -m accelerate.commands.launch` does, in a process that has imported it already."""
    from accelerate.commands import launch as launcher

    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    launcher.main()


def _read_to_end(descriptor: int, deadline: float) -> str | None:
    """What is written until the last writer has closed the pipe; None: it is open at the deadline."""
    chunks = []
    while select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
        chunks.append(os.read(descriptor, 65536))
        if not chunks[-1]:
            return b"".join(chunks).decode(errors="replace")
    return None


def kill_tree(pid: int) -> None:
    """Kill a launcher and all processes below it: the ranks, which have sessions of their own, and their workers."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def on_ranks(world_size: int, folder: Path, work: Callable[[int], None]) -> list[int]:
    """Run `work(rank)` in forked processes with a gloo group; their exit codes."""
    rendezvous = folder / f"rendezvous{random.getrandbits(64)}"

    def run(rank: int) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)  # the threads of this process's OpenMP didn't survive the fork
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        work(rank)
        dist.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, "a rank hangs"
    return [process.exitcode or 0 for process in processes]
