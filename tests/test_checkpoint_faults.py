"""Whatever fails or dies, and whenever the power goes: a whole checkpoint is there. Each operation in turn."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainloop import CheckpointError
from trainloop.checkpoint import Checkpoint, CheckpointStore, Content, FileSystem, KeepPrevious, RetentionPolicy

from .launching import REPOSITORY, launch, on_ranks
from .workers.checkpoint_store import ABOUT, folder_of, in_child, names, small

KILLED = 9


class Tampered(FileSystem):
    """A disk that calls `before(operation, arguments)` before each operation that changes it."""

    def __init__(self, before: Callable[[str, tuple[Any, ...]], None]) -> None:
        self.before = before

    def make_dir(self, path: Path) -> None:
        self.before("make_dir", (path,))
        super().make_dir(path)

    def write(self, path: Path, buffers: Iterable[Any], sync: bool = True) -> None:
        buffers = list(buffers)
        self.before("write", (path, b"".join(map(bytes, buffers))))
        super().write(path, buffers, sync)

    def sync_file(self, file: Any) -> None:
        self.before("sync_file", (Path(file.name),))
        super().sync_file(file)

    def sync_dir(self, path: Path) -> None:
        self.before("sync_dir", (path,))
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", (source, target))
        super().rename(source, target)

    def replace_symlink(self, link: Path, target: str, beside: Path) -> None:
        self.before("replace_symlink", (link, target, beside))
        super().replace_symlink(link, target, beside)

    def remove_tree(self, path: Path) -> None:
        self.before("remove_tree", (path,))
        super().remove_tree(path)


class FailingAt(Tampered):
    """Instead of the operation with this number, from 1, `fail` happens."""

    def __init__(self, number: int, fail: Callable[[str, tuple[Any, ...]], None]) -> None:
        super().__init__(self._count)
        self.left, self.fail = number, fail

    def _count(self, operation: str, args: tuple[Any, ...]) -> None:
        self.left -= 1
        if self.left == 0:
            self.fail(operation, args)

    @property
    def has_failed(self) -> bool:
        return self.left <= 0


def die(operation: str, args: tuple[Any, ...]) -> None:
    os._exit(KILLED)


def die_half_way(operation: str, args: tuple[Any, ...]) -> None:
    """The process ends in the middle of an operation that has one."""
    if operation == "write":
        args[0].write_bytes(args[1][: len(args[1]) // 2])
    elif operation == "remove_tree" and not args[0].is_symlink():
        for path in [path for path in sorted(args[0].rglob("*")) if path.is_file()][::2]:
            path.unlink()
    elif operation == "replace_symlink":
        os.symlink(args[1], args[2])
    os._exit(KILLED)


def input_output_error(operation: str, args: tuple[Any, ...]) -> None:
    raise OSError(5, "Input/output error")


# ---------------------------------------------------------------------- what is saved, and what is found


def content(step: int, value: float) -> Content:
    """Like `small(step)`, but all of it says `value`."""
    made = small(step)
    for tensors in made.groups().values():
        for tensor in tensors.values():
            tensor.fill_(value)
    made.global_state = {"value": value}
    return made


def found(root: Path) -> float | None:
    """What a run that starts now would load: the value in every part of the latest checkpoint; None: nothing at all.

    Raises if there is no whole one, or if a checkpoint that it could be is not whole.
    """
    store = CheckpointStore(root)
    store.open()
    checkpoint = store.resolve("latest")
    store.close()
    assert all(name == "latest" or name.startswith("step_") for name in names(root)), "something was left behind"
    for info in store.checkpoints():
        assert not Checkpoint.open(folder_of(root, info.step)).find_problems()
    assert len(store.checkpoints()) == sum(name != "latest" for name in names(root))
    if checkpoint is None:
        return None
    tensors = {n: torch.zeros(s, dtype=d) for n, (s, d) in checkpoint.tensors("model").items()}
    checkpoint.read_into("model", tensors)
    (value,) = {float(x) for tensor in tensors.values() for x in tensor} | {checkpoint.global_state()["value"]}
    return value


def template(root: Path, *steps: int) -> Path:
    """A folder of checkpoints that hold their step."""
    store = CheckpointStore(root)
    for step in steps:
        store.save(step, content(step, float(step)), **ABOUT, retention=[KeepPrevious(99)])
    store.close()
    return root


SCENARIOS: dict[str, tuple[tuple[int, ...], int, list[RetentionPolicy]]] = {
    "next step": ((1,), 2, []),
    "only step again": ((1,), 1, []),
    "one of several again": ((1, 2, 3), 3, [KeepPrevious(1)]),
}
"""Steps on the disk, the step to save, what to keep."""
NEW = 0.5
"""What the new checkpoint holds."""


@pytest.fixture(params=SCENARIOS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Iterator[Path], float, Callable[..., None]]:
    """Copies of a folder of checkpoints, the value of the latest in it, and a function that saves the new one."""
    steps, step, retention = SCENARIOS[request.param]
    original = template(tmp_path / "original", *steps)

    def save(root: Path, fs: FileSystem) -> None:
        store = CheckpointStore(root, fs=fs)
        store.save(step, content(step, NEW), **ABOUT, retention=retention)
        store.wait()

    copies = (Path(shutil.copytree(original, tmp_path / str(i), symlinks=True)) for i in itertools.count(1))
    return copies, float(steps[-1]), save


# ---------------------------------------------------------------------- one process


@pytest.mark.parametrize("end", [die, die_half_way])
def test_a_process_may_be_killed_at_any_operation(scene: Any, end: Callable[..., None]) -> None:
    """A kill at each operation of a save, and then another at each of the clean-up: the next run finds the checkpoint
    before or the new one, whole; never the one before again once the new one was found; and it leaves no rubbish.
    """
    copies, old, save = scene
    values: list[float | None] = []
    num_kills_in_cleanup = 0
    for number, root in enumerate(copies, 1):
        fs = FailingAt(number, end)
        exit_code = in_child(lambda root=root, fs=fs: save(root, fs))
        assert exit_code in (0, KILLED)
        after: set[float | None] = set()
        for second in itertools.count(1):
            again = Path(shutil.copytree(root, root.with_name("again"), symlinks=True))
            fs = FailingAt(second, die_half_way)
            was_killed = in_child(lambda again=again, fs=fs: CheckpointStore(again, fs=fs).open()) == KILLED
            after.add(found(again))
            shutil.rmtree(again)
            num_kills_in_cleanup += was_killed
            if not was_killed:
                break
        (value,) = after  # the clean-up never changes which one it is
        values.append(value)
        if exit_code == 0:
            break
    assert set(values) == {old, NEW}
    assert values == sorted(values, key=lambda value: value == NEW)
    assert len(values) > 15
    assert num_kills_in_cleanup > 10


def test_any_operation_may_fail(scene: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An input/output error at each operation of a save is a CheckpointError while the checkpoint before is the latest,
    and a warning when the new one is; the same store then saves as if nothing had been.
    """
    copies, old, _ = scene
    for number, root in enumerate(copies, 1):
        caplog.clear()
        fs = FailingAt(number, input_output_error)
        store = CheckpointStore(root, fs=fs)
        error = None
        try:
            store.save(7, content(7, NEW), **ABOUT)
            store.wait()
        except CheckpointError as ex:
            error = ex
        assert not fs.has_failed or (error is not None) != bool(caplog.records)
        assert error is None or "Input/output error" in str(error)
        if fs.has_failed:
            store.save(8, content(8, 8.0), **ABOUT, retention=[KeepPrevious(99)])
        store.close()
        if not fs.has_failed:
            break
        shutil.rmtree(folder_of(root, 8))
        assert found(root) in ([NEW, old] if error else [NEW])
    assert number > 15


# ---------------------------------------------------------------------- two processes


@pytest.mark.parametrize("victim", [0, 1])
def test_either_of_two_ranks_may_be_killed_at_any_operation(tmp_path: Path, victim: int) -> None:
    """The other rank does not hang, and the next run finds the checkpoint before or the new one, whole."""
    original = tmp_path / "original"
    on_ranks(2, tmp_path, lambda rank: template(original, 1) and None)
    values: list[float | None] = []
    for number in itertools.count(1):
        root = Path(shutil.copytree(original, tmp_path / str(number), symlinks=True))

        def save(rank: int, root: Path = root, number: int = number) -> None:
            fs = FailingAt(number, die_half_way) if rank == victim else FileSystem()
            store = CheckpointStore(root, fs=fs)
            store.save(1, content(1, NEW), **ABOUT)
            store.wait()

        exit_codes = on_ranks(2, tmp_path, save)
        values.append(found(root))
        if exit_codes == [0, 0]:
            break
        assert exit_codes[victim] == KILLED
    assert set(values) == {1.0, NEW}
    assert values == sorted(values, key=lambda value: value == NEW)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks say when one of them fails, by scenario; the worker asserts that both say the same."""
    import json

    folder = tmp_path_factory.mktemp("told")
    launch(REPOSITORY / "tests" / "workers" / "checkpoint_store.py", "ddp2", "failures", str(folder), "ddp2")
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("fsize-sync-0", "rank 0: OSError: [Errno 27] File too large: '/"),
        ("fsize-sync-1", "rank 1: OSError: [Errno 27] File too large: '/"),
        ("fsize-async-0", "rank 0: OSError: [Errno 27] File too large: '/"),
        ("fsize-async-1", "rank 1: OSError: [Errno 27] File too large: '/"),
        ("state", "rank 1: TypeError: State to be saved may hold"),
        ("groups", "those of rank 1 differ, first in optim/m, as rank 0 has it"),
        ("shapes", "those of rank 1 differ, first in model/w2, as rank 0 has it"),
        ("snapshot", "rank 1: MemoryError: no memory for the copy"),
        ("apart", "is not the folder that rank 0 sees. Give a path that all nodes share"),
    ],
)
def test_all_ranks_raise_what_one_of_them_met(told: dict[str, Any], scenario: str, message: str) -> None:
    """A full disk, a bad state, different tensors, no memory, another folder on one rank: the same error on each rank,
    which names that rank; the checkpoint before is the latest, and nothing is left behind.
    """
    assert message in told[scenario]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_operation_that_fails_on_one_rank_fails_on_all(told: dict[str, Any], rank: int) -> None:
    """Up to the commit each operation's failure is every rank's error; after it, it is none."""
    outcomes = told[f"operations-{rank}"]
    errors = [outcome for outcome in outcomes if outcome != "saved"]
    assert all(f"rank {rank}: OSError: [Errno 5] Input/output error" in error for error in errors)
    assert outcomes == errors + ["saved"] * (len(outcomes) - len(errors))
    assert len(errors) > 4


# ---------------------------------------------------------------------- the power goes


class Node:
    """A file, link or folder as a disk has it: what is there, and what will be there after the power was gone."""

    def __init__(self, data: bytes | str | None = None) -> None:
        self.data = data
        """Bytes of a file, target of a link, None for a folder."""
        self.is_synced = isinstance(data, str)
        self.entries: dict[str, Node] = {}
        self.durable: dict[str, Node] = {}
        self.pending: list[dict[str, Node | None]] = []

    def change(self, changes: dict[str, Node | None]) -> None:
        """Change names of a folder, all at once."""
        self.pending.append(changes)
        _apply(self.entries, changes)

    def sync(self) -> None:
        self.is_synced, self.durable, self.pending = True, dict(self.entries), []

    def write_out(self, path: Path, rng: random.Random, mode: str) -> None:
        """What is found after the power was gone: of all that was not synced, any part may be there."""
        if isinstance(self.data, str):
            path.symlink_to(self.data)
        elif self.data is not None:
            torn = [b"", self.data[: len(self.data) // 2], bytes(len(self.data)), self.data]
            path.write_bytes(self.data if self.is_synced or mode == "all" else rng.choice(torn))
        else:
            path.mkdir()
            entries = dict(self.durable)
            for changes in self.pending:
                if mode == "all" or (mode == "some" and rng.random() < 0.5):
                    _apply(entries, changes)
            for name, node in entries.items():
                node.write_out(path / name, rng, mode)


def _apply(entries: dict[str, Node], changes: dict[str, Node | None]) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class ModelDisk:
    """Replays recorded operations on nodes."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, Node()

    def node(self, path: Path) -> Node:
        node = self.root
        for name in path.relative_to(self.base).parts:
            node = node.entries[name]
        return node

    def replay(self, operation: str, args: tuple[Any, ...]) -> None:
        path = args[0]
        if operation == "make_dir":
            for folder in [*reversed(path.relative_to(self.base).parents), path.relative_to(self.base)][1:]:
                parent = self.node((self.base / folder).parent)
                if folder.name not in parent.entries:
                    parent.change({folder.name: Node()})
        elif operation == "write":
            self.node(path.parent).change({path.name: Node(args[1])})
        elif operation in ("sync_file", "sync_dir"):
            self.node(path).sync()
        elif operation == "rename":
            self.node(path.parent).change({path.name: None, args[1].name: self.node(path)})
        elif operation == "replace_symlink":
            self.node(path.parent).change({path.name: Node(args[1])})
        elif operation == "remove_tree":
            self._remove(self.node(path))
            self.node(path.parent).change({path.name: None})
        else:
            raise AssertionError(operation)

    def _remove(self, node: Node) -> None:
        for name, child in list(node.entries.items()):
            self._remove(child)
            node.change({name: None})


Event = tuple[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """All operations of a run: new steps, the same step again, a roll-back, retention. A "begin" stands before each
    save and an "end" where it has returned, with the value that it saved; then the thread removes the old ones.
    """
    base = tmp_path_factory.mktemp("recorded")
    events: list[Event] = []
    has_returned = threading.Event()

    def note(operation: str, args: tuple[Any, ...]) -> None:
        if threading.current_thread() is not threading.main_thread():
            has_returned.wait()
        events.append((operation, args))

    store = CheckpointStore(base / "checkpoints", fs=Tampered(note))
    for value, (step, retention) in enumerate([(1, []), (2, []), (2, []), (3, [KeepPrevious(1)]), (1, [])], 1):
        events.append(("begin", (float(value),)))
        store.save(step, content(step, float(value)), **ABOUT, retention=retention)
        events.append(("end", (float(value),)))
        has_returned.set()
        store.wait()
        has_returned.clear()
    store.close()
    return base, events


def loses(base: Path, events: list[Event], folder: Path, seeds: Iterable[int], start: int = 0) -> Iterator[str]:
    """Let the power go after each event from `start` on, in several ways, and tell what was lost or is wrong."""
    disk = ModelDisk(base)
    allowed: set[float | None] = {None}
    for i, (operation, args) in enumerate(events):
        if operation == "begin":
            allowed = allowed | {args[0]}
        elif operation == "end":
            allowed = {args[0]}
        else:
            disk.replay(operation, args)
        for seed, mode in [(0, "none"), (0, "all"), *((seed, "some") for seed in seeds)] if i >= start else []:
            shutil.rmtree(folder, ignore_errors=True)
            disk.root.write_out(folder, random.Random(f"{i} {seed}"), mode)
            try:
                value = found(folder / "checkpoints")
            except (CheckpointError, AssertionError) as ex:
                yield f"after event {i}, {mode} {seed}: {ex}"
            else:
                if value not in allowed:
                    yield f"after event {i}, {mode} {seed}: found {value} instead of {allowed}"


def test_the_power_may_go_at_any_moment(recorded: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """Of all that was not synced any part may be on the disk: the last checkpoint whose save has returned is found, or
    the one on its way, and nothing that is not whole looks like a checkpoint.
    """
    base, events = recorded
    assert list(loses(base, events, tmp_path / "disk", range(8))) == []


def test_every_sync_is_needed(recorded: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """Without any single one of the syncs there is a moment at which the power takes something: so the model above can
    fail, and there is no sync too many.
    """
    base, events = recorded
    syncs = [i for i, (operation, _) in enumerate(events) if operation.startswith("sync")]
    assert len(syncs) > 40
    for i in syncs:
        end = next((j for j in range(i, len(events)) if events[j][0] == "end"), len(events))
        without = events[:i] + events[i + 1 : end + 1]
        # Most show at once; the rest is a matter of luck.
        attempts = (loses(base, without, tmp_path / "disk", seeds, start=i) for seeds in ((), range(3), range(3, 60)))
        assert any(next(attempt, None) for attempt in attempts), f"{events[i]} can be left out"
