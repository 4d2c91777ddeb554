"""Systems side by side: each in a process of its own (or several, under DDP), taking turns, A B C … A B C ….

A busy machine then slows all of them alike, and what counts is the ratio within each round of turns. CPU time is that
of all threads of a process, summed over the ranks; it is what another program that wants the cores changes least.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import torch

from .environment import environments
from .tasks import Task

REPOSITORY = Path(__file__).parents[1]
REQUIRES = {
    "Lightning": "lightning",
    "transformers Trainer": "transformers",
    "pytorch-accelerated": "pytorch_accelerated",
    "Ignite": "ignite",
}
"""The module that a system needs beyond the package's own dependencies."""
_GRACE = 5.0
"""Seconds for which an answer that is due may come later than a run's end."""
TOLERANCE = 1e-6
"""Largest difference of any parameter for two systems to have trained the same, relative to its magnitude or absolute.
The table says where it is 0."""


@dataclass(frozen=True)
class System:
    """Who trains."""

    name: str
    """As in `worker.SYSTEMS`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its `train`."""
    label: str = ""
    """In the table."""
    cwd: Path = REPOSITORY
    """Folder that `benchmarks` and `trainloop` are imported from."""

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(REQUIRES.get(self.name, "torch")) is not None


BARE_TORCH = System("bare torch")
BARE_ACCELERATE = System("bare Accelerate")
TRAINLOOP = System("trainloop")
FOUR_HOOKS = System("trainloop", {"hooks": "four"}, "trainloop, four hooks")
PEERS = [System(name) for name in REQUIRES]
MAIN = [BARE_TORCH, BARE_ACCELERATE, TRAINLOOP, FOUR_HOOKS]


@dataclass
class Measured:
    """What one system's run of a task has cost."""

    cpu: list[float] = field(default_factory=list)
    """CPU seconds of each turn after the first, all ranks together."""
    wall: list[float] = field(default_factory=list)
    """Wall seconds of each turn after the first, those of the slowest rank."""
    first_step_cpu: float = float("nan")
    """CPU seconds of rank 0 from the start of its process to the end of its first step: to the end of the first turn,
    less what the other steps of a turn take."""
    resident: int = 0
    """Bytes in RAM at the last turn, of rank 0."""
    host_reads: float = float("nan")
    """Of rank 0, an optimizer step, over the last turns."""
    difference: float = float("inf")
    """The largest difference of any parameter to the first system's; 0: bitwise equal."""
    device_memory: int = 0
    """Peak of the memory that torch has allocated on the GPU, in bytes, of rank 0."""
    error: str = ""
    """Why there are no numbers."""

    @property
    def is_equal(self) -> bool:
        return self.difference <= TOLERANCE


def run(
    task: Task, systems: Sequence[System], *, timeout: float = 120, together: bool = False, until: float = float("inf")
) -> dict[str, Measured]:
    """Train `task` with each of the systems, in turns.

    Args:
        task: What is trained.
        systems: The first is what the others are compared with.
        timeout: Seconds without a sign of life after which a system is given up.
        together: Start all systems at the same time, and let them warm up so. That saves minutes where many cores are
            idle, but then `first_step_cpu` means nothing.
        until: By `time.monotonic`. No turn begins later, and who does not answer soon after it is given up; the
            parameters are then not compared.

    Returns:
        By `System.title`; a system that failed or is not installed has its `error`.
    """
    results = {system.title: Measured() for system in systems}
    contenders: list[_Contender] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        key = secrets.token_bytes(16)
        listener = stack.enter_context(Listener(str(folder / "socket"), "AF_UNIX", authkey=key))
        for number, system in enumerate(systems):
            if not system.is_installed:
                results[system.title].error = f"{REQUIRES[system.name]} is not installed: `make bench-full` does it"
                continue
            contender = _Contender(system, number, task, folder, results[system.title], timeout, until)
            stack.callback(contender.end)
            contender.start(listener, key)
            if not together:  # what starts beside another takes longer
                _await_start([contender], listener, min(time.monotonic() + timeout, until))
            contenders.append(contender)
        if together:
            _await_start(contenders, listener, min(time.monotonic() + timeout, until))
        for turn in range(task.num_turns):
            if together and turn == 0:  # it warms up, and perhaps compiles for a minute
                for contender in contenders:
                    contender.begin_turn()
                for contender in contenders:
                    contender.end_turn()
            elif time.monotonic() < until:
                for contender in contenders:
                    contender.begin_turn()
                    contender.end_turn()
        if time.monotonic() < until:
            for contender in contenders:
                contender.finish()
        states = {c.system.title: c.state for c in contenders if c.state is not None}
    reference = states.get(systems[0].title)
    for title, state in states.items():
        results[title].difference = float("inf") if reference is None else _difference(state, reference)
    return results


def _await_start(contenders: Sequence[_Contender], listener: Listener, end: float) -> None:
    """Wait until every rank of these wants its first batch, or until its system is given up."""
    listening = listener._listener._socket  # type: ignore[attr-defined]  # `Listener` has no timeout of its own
    while missing := [contender for contender in contenders if contender.is_missing()]:
        listening.settimeout(0.1)
        try:
            connection: Connection = listener.accept()
        except TimeoutError:
            for contender in missing:
                if contender.has_died() or time.monotonic() > end:
                    contender.give_up()
        else:
            number, rank = connection.recv()
            next(contender for contender in contenders if contender.number == number).join(rank, connection)
    for contender in contenders:
        contender.hear()


class _Contender:
    """One system's processes, as the harness sees them."""

    def __init__(
        self,
        system: System,
        number: int,
        task: Task,
        folder: Path,
        result: Measured,
        timeout: float,
        until: float,
    ) -> None:
        self.system, self.number, self._task, self._folder, self._result = system, number, task, folder, result
        self._timeout, self._until = timeout, until
        self._processes: list[subprocess.Popen[bytes]] = []
        self._joined: dict[int, Connection] = {}
        self._ranks: list[Connection] = []
        self._output = folder / f"{number}.txt"
        self._num_turns = 0
        self._reads: list[int] = []
        self.state: dict[str, torch.Tensor] | None = None

    def start(self, listener: Listener, key: bytes) -> None:
        """Start the processes."""
        request = {
            "task": asdict(self._task),
            "system": self.system.name,
            "options": self.system.options,
            "number": self.number,
            "address": listener.address,
            "key": key.hex(),
            "folder": str(self._folder),
        }
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(request)]
        with self._output.open("wb") as output:
            for env in environments(self._task):
                cwd = self.system.cwd
                process = subprocess.Popen(command, env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
                self._processes.append(process)

    def is_missing(self) -> bool:
        """Whether a rank has not joined yet."""
        return self._result.error == "" and len(self._joined) < len(self._processes)

    def has_died(self) -> bool:
        """Whether a process has ended."""
        return any(process.poll() is not None for process in self._processes)

    def join(self, rank: int, connection: Connection) -> None:
        """Take the connection of a rank."""
        self._joined[rank] = connection
        if len(self._joined) == len(self._processes):
            self._ranks = [self._joined[rank] for rank in sorted(self._joined)]

    def begin_turn(self) -> None:
        """Let it go on."""
        self._num_turns += 1
        for rank in self._ranks:
            rank.send(None)

    def end_turn(self) -> None:
        """Wait until the turn is over, and note what it has cost."""
        messages = self.hear()
        if not messages:
            return
        cpu = sum(message["turn_cpu"] for message in messages)
        self._reads.append(messages[0]["host_reads"])
        if self._num_turns == 1:
            self._result.first_step_cpu = messages[0]["cpu"]
            return
        if self._num_turns == 2:
            self._result.first_step_cpu -= messages[0]["turn_cpu"] * (1 - 1 / self._task.num_steps)
        self._result.cpu.append(cpu)
        self._result.wall.append(max(message["turn_wall"] for message in messages))
        self._result.resident = messages[0]["resident"]
        self._result.device_memory = messages[0].get("device_memory", 0)

    def finish(self) -> None:
        """Let it train to its end and hand over what it has trained."""
        for rank in self._ranks:
            rank.send(None)
        if self.hear() is None or not self._ranks:
            return
        if self._task.counts_host_reads and len(self._reads) > 1:
            steps = self._task.num_steps * (len(self._reads) - 1)
            self._result.host_reads = (self._reads[-1] - self._reads[0]) / steps
        self.state = torch.load(self._folder / f"{self.number}_0.pt", weights_only=True)
        for rank in self._ranks:
            rank.send(None)

    def hear(self) -> list[Any] | None:
        """What every rank says next; None if one of them says nothing any more."""
        heard: dict[Connection, Any] = {}
        while len(heard) < len(self._ranks):
            patience = min(self._timeout, max(0.0, self._until - time.monotonic()) + _GRACE)
            ready = wait([rank for rank in self._ranks if rank not in heard], patience)
            try:
                heard |= {rank: rank.recv() for rank in ready}  # type: ignore[union-attr, misc]
            except (EOFError, ConnectionError):
                ready = []
            if not ready:
                self.give_up()
                return None
        return [heard[rank] for rank in self._ranks]

    def give_up(self) -> None:
        """End it, and tell what it said last."""
        self.end()
        self._ranks = []
        lines = self._output.read_text(errors="replace").strip().splitlines() or ["it did not answer, and said nothing"]
        self._result.error = lines[-1]
        print(f"  {self.system.title} failed:\n    " + "\n    ".join(lines[-15:]), file=sys.stderr, flush=True)

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None and self._result.error == "" and self.state is not None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
            if process.poll() is None:
                process.kill()
            process.wait()
        for rank in self._ranks:
            rank.close()


def _difference(state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    if state.keys() != reference.keys():
        return float("inf")
    largest = 0.0
    for name, value in state.items():
        wanted = reference[name]
        if not torch.equal(value, wanted):
            gap = (value.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)
            largest = max(largest, gap.max().nan_to_num(float("inf")).item())
    return largest


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3 if values else (float("nan"),) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round."""
    return [value / other for value, other in zip(values, reference, strict=True)]
