"""How trainloop's own cost of a step grows: with hooks, records, parameters and processes."""

from __future__ import annotations

from dataclasses import dataclass

from .harness import BARE_TORCH, TRAINLOOP, Measured, System, quartiles, run
from .tasks import Task


@dataclass
class Growth:
    """CPU time of a step beyond what it is compared with, against how many there are."""

    of: str
    """One of what: "hook"."""
    counts: list[int]
    microseconds: list[float]
    compared_with: str

    @property
    def slope(self) -> float:
        """Microseconds for each one more: the least-squares line."""
        n = len(self.counts)
        x, y = sum(self.counts) / n, sum(self.microseconds) / n
        above = sum((a - x) * (b - y) for a, b in zip(self.counts, self.microseconds, strict=True))
        return above / sum((a - x) ** 2 for a in self.counts)


def measure(scale: float = 1.0) -> list[Growth]:
    """All four. `scale` shortens the runs."""
    return [hooks(scale), records(scale), parameters(scale), processes(scale)]


def hooks(scale: float) -> Growth:
    counts = [0, 10, 25, 50]
    systems = [System("trainloop", {"hooks": count}, str(count)) for count in counts]
    return _within("empty hook", counts, systems, Task("tiny MLP", num_steps=100, num_turns=_turns(25, scale)))


def records(scale: float) -> Growth:
    counts = [0, 10, 100, 1000]
    systems = [System("trainloop", {"hooks": "log", "num_records": count}, str(count)) for count in counts]
    return _within("record", counts, systems, Task("tiny MLP", num_steps=20, num_turns=_turns(15, scale)))


def _within(of: str, counts: list[int], systems: list[System], task: Task) -> Growth:
    results = run(task, systems)
    none = results[systems[0].title]
    values = [_beyond(results[system.title], none, task) for system in systems]
    return Growth(of, counts, values, "trainloop without")


def parameters(scale: float) -> Growth:
    counts = [10, 100, 1000, 10_000]
    values = []
    for count in counts:
        task = Task(f"{count} tensors", num_steps=max(2, 2000 // count), num_turns=_turns(10, scale))
        results = run(task, [BARE_TORCH, TRAINLOOP])
        values.append(_beyond(results["trainloop"], results["bare torch"], task))
    return Growth("parameter tensor", counts, values, "bare torch")


def processes(scale: float) -> Growth:
    counts = [1, 2, 4]
    values = []
    for count in counts:
        task = Task("tiny MLP", world_size=count, num_steps=50, num_turns=_turns(15, scale))
        results = run(task, [BARE_TORCH, TRAINLOOP])
        values.append(_beyond(results["trainloop"], results["bare torch"], task) / count)
    return Growth("process, for each of them", counts, values, "bare torch's DDP")


def _turns(number: int, scale: float) -> int:
    return max(4, round(number * scale))


def _beyond(own: Measured, other: Measured, task: Task) -> float:
    """The median over the rounds, in microseconds a step."""
    if own.error or other.error:
        raise RuntimeError(f"{own.error}{other.error}")
    pairs = zip(own.cpu, other.cpu, strict=True)
    return quartiles([(a - b) / task.num_steps * 1e6 for a, b in pairs])[1]
