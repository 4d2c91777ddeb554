"""A fuzzer of checkpoints: manifest, headers, state and folder of a real one are changed at random, seals made anew.

Each load must end in the right bits, in another checkpoint ("latest" only) or in a CheckpointError, and soon; and read
nothing outside of the folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainloop import CheckpointError
from trainloop.checkpoint import Checkpoint, CheckpointStore, Content, KeepInterval

from .folders import Quick
from .tampering import change_header, replace_by_fifo, reseal, set_to
from .workers.checkpoint_store import bits, folder_of

HANGS_AFTER = 60
"""Seconds. A load takes milliseconds."""
WEIGHTS = "model/model.safetensors"
HEADERS = [WEIGHTS, "ema/model.safetensors", "optim/rank_00000.safetensors", "state/rank_00000.safetensors"]
STATES = ["state/global.json", "state/rank_00000.json"]
PLACES = ["manifest.json", "tables.json", "model", "state", *HEADERS, *STATES]
DEEP: Any = 0
for _ in range(300):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**62, 2**63, 10**400, 1.5, 1e308, float("nan"), float("inf")),
    *("", "x", "w0", "w1", "model", "float64", "int32", "F64", "load", "\0", "\ud800", "\u2028", "x" * 5000),
    *("../../outside/model/model.safetensors", "/dev/zero", "/etc/passwd", "manifest.json", *HEADERS),
    *([], [[]], {}, [0], [-1], [2**62], [1] * 70, [0, 400], [100], [10, 10], DEEP),
    *({"$float": "nan"}, {"$float": "x"}, {"$items": 1}, {"$items": [[[], 1]]}, {"$tensor": "x"}, {"$complex": "x"}),
    *(
        {"$numpy": ["int8", 1000]},
        {"$numpy": []},
        {"$deque": [[], 10**30]},
        {"$defaultdict": ["x", []]},
        {"$set": [[]]},
    ),
]


# ---------------------------------------------------------------------- what is changed


def places_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in nested JSON but the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places_in(item, (*path, key))


def change_tree(tree: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """One change somewhere in nested JSON: another value, one from elsewhere in it, none, one more, another name."""
    places = list(places_in(tree))
    if not places:
        return
    *parents, key = draw(st.sampled_from(places))
    parent = tree
    for step in parents:
        parent = parent[step]
    action = draw(st.sampled_from(["odd", "odd", "copy", "remove", "add", "rename"]))
    if action == "odd":
        parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    elif action == "copy":
        value = tree
        for step in draw(st.sampled_from(places)):
            value = value[step]
        parent[key] = copy.deepcopy(value)
    elif action == "remove":
        del parent[key]
    elif action == "add":
        value = draw(st.sampled_from(ODD))
        parent.insert(0, value) if isinstance(parent, list) else parent.update(
            {draw(st.sampled_from(["x", "w9"])): value}
        )
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from([odd for odd in ODD if isinstance(odd, str)]))] = parent.pop(key)


def change_file(folder: Path, outside: Path, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """One change of what lies in the folder."""
    path = folder / draw(st.sampled_from(PLACES))
    action = draw(st.sampled_from(["fifo", "device", "outside", "folder", "remove", "cut", "bytes", "length"]))
    if not path.is_file() or path.is_symlink():
        if not os.path.lexists(path) or action not in ("outside", "remove"):
            return
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if action == "outside":
            path.symlink_to(outside / path.relative_to(folder))
    elif action == "fifo":
        replace_by_fifo(path)
    elif action in ("cut", "bytes", "length"):
        raw = bytearray(path.read_bytes())
        if action == "cut":
            del raw[draw(st.integers(0, len(raw))) :]
        elif action == "length":
            raw[:8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 8, len(raw), 10**8, 2**40, 2**63, 2**64 - 1])))
        else:  # before the bytes of the tensors, which are right if the checksum says so
            position = draw(st.integers(0, min(len(raw), 100) - 1)) if raw else 0
            raw[position : position + 1] = draw(st.binary(max_size=3))
        path.write_bytes(raw)
    else:
        path.unlink()
        if action == "folder":
            path.mkdir()
        elif action != "remove":
            path.symlink_to("/dev/zero" if action == "device" else outside / path.relative_to(folder))


@st.composite
def changes(draw: Callable[..., Any]) -> Callable[[Path, Path], None]:
    """One to three changes, after which every seal is right but those that were changed themselves."""
    number = draw(st.integers(1, 3))
    kinds = [draw(st.sampled_from(["manifest", "manifest", "header", "state", "folder"])) for _ in range(number)]
    data = draw(st.data())

    def apply(folder: Path, outside: Path) -> None:
        for kind in sorted(kinds, key=["header", "state", "manifest", "folder"].index):
            if kind == "header":
                change_header(folder / data.draw(st.sampled_from(HEADERS)), lambda tree: change_tree(tree, data.draw))
            elif kind == "state":
                path = folder / data.draw(st.sampled_from(STATES))
                state = json.loads(path.read_text())
                change_tree(state, data.draw)
                path.write_text(json.dumps(state))
        if "folder" in kinds and data.draw(st.booleans()):
            change_file(folder, outside, data.draw)
        if (folder / "manifest.json").is_file() and not (folder / "manifest.json").is_symlink():
            try:
                reseal(folder, lambda tree: [change_tree(tree, data.draw) for kind in kinds if kind == "manifest"])
            except ValueError:
                return  # the manifest is no JSON any more
        if "folder" in kinds:
            change_file(folder, outside, data.draw)

    return apply


# ---------------------------------------------------------------------- what must hold


def content(step: int) -> Content:
    """Tensors of different shapes and dtypes, tied and complex ones, and nested state with tensors in it."""
    tied = torch.full((3, 4), float(step))
    model = {f"w{i}": torch.full((100 + i,), float(step)) for i in range(3)}
    model |= {"tied": tied, "again": tied, "half": torch.full((5,), step, dtype=torch.bfloat16)}
    model |= {"c": torch.full((6,), complex(step, 1)), "none": torch.zeros(0, 3), "scalar": torch.tensor(step)}
    return Content(
        {"model": model, "ema": {"w0": torch.full((100,), float(step))}},
        {"optim": {"w0/m": torch.full((50,), float(step))}},
        {"step": step, "hooks": {3: [step, None], "x": {"$": 0.5}}},
        {"rng": torch.full((7,), step), "c": torch.full((2,), complex(0, step))},
    )


def expected(step: int) -> dict[str, dict[str, bytes]]:
    return {group: {name: bits(t) for name, t in tensors.items()} for group, tensors in content(step).groups().items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, and outside of it one in the same form that holds other values."""
    base = tmp_path_factory.mktemp("fuzz")
    for root, steps in ((base / "original" / "checkpoints", (10, 20)), (base / "other", (666,))):
        store = CheckpointStore(root, fs=Quick())
        for step in steps:
            store.save(step, content(step), run_id="run", retention=[KeepInterval(1)], metrics={"loss": 1.5})
        store.close()
        for step in steps:  # as if there had been several ranks
            rule = {"dtype": "float32", "shape": [50], "first": 0, "cuts": [[0, 50, 1]]}
            reseal(folder_of(root, step), set_to(rule, "tensors", "optim", "w0/m"))
    shutil.move(folder_of(base / "other", 666), base / "original" / "outside")
    return base / "original"


OPENED: list[str] = []
"""While it is watched: what was opened by name."""
_is_watched = False


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _is_watched and event == "open":
        OPENED.append(os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else str(args[0]))


sys.addaudithook(_note)


def load(root: Path, which: Any, verify: Any) -> str:
    """How one load ends. Anything that must not happen raises."""
    global _is_watched
    OPENED.clear()
    _is_watched = True
    try:
        checkpoint = CheckpointStore(root).resolve(which, verify)
        assert checkpoint is not None
        read_all(checkpoint)
        return "passed over" if checkpoint.folder != folder_of(root, 20) else "right"
    except CheckpointError as ex:
        return f"error: {ex}"
    finally:
        _is_watched = False
        for path in OPENED:
            assert ".." not in path.split("/")
            assert not path.startswith(("/dev/zero", "/etc/passwd", str(root.parent / "outside"))), path


def read_all(checkpoint: Checkpoint) -> None:
    """Fill tensors with all groups, as a run would, and compare them with what was saved in this folder."""
    step = int(checkpoint.folder.name[5:])
    for group, tensors in content(step).groups().items():
        targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        checkpoint.read_into(group, targets)
        assert {name: bits(tensor) for name, tensor in targets.items()} == expected(step)[group]
    checkpoint.global_state()
    checkpoint.rank_state(0)


def check(original: Path, change: Callable[[Path, Path], None], verify: Any) -> None:
    work = original.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(original, work, symlinks=True)
    root = work / "checkpoints"
    change(folder_of(root, 20), work / "outside")

    def hang(*_: Any) -> None:
        raise AssertionError(f"a load takes more than {HANGS_AFTER} s")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANGS_AFTER)
    try:
        ends = {str(which): load(root, which, verify) for which in ("latest", 20, folder_of(root, 20))}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if verify == "full" and not is_of_newer_format(folder_of(root, 20)):
        # A folder that cannot be loaded must not block the good ones. What is not of the model cannot be seen before.
        told = ends["latest"]
        is_of_other_model = "are not those to be filled" in told or "has no tensors in a group" in told
        assert not told.startswith("error") or is_of_other_model, told


def is_of_newer_format(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except CheckpointError as ex:
        return "Update trainloop" in str(ex)
    return False


SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(SETTINGS, max_examples=60, derandomize=True)
@given(change=changes(), verify=st.sampled_from(["full", "full", "size", "off"]))
def test_no_change_leads_to_wrong_bits(original: Path, change: Any, verify: Any) -> None:
    """A few changes, always the same; the slow form looks at 2,000 others each time."""
    check(original, change, verify)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(SETTINGS, max_examples=2000)
@given(change=changes(), verify=st.sampled_from(["full", "full", "size", "off"]))
def test_no_change_of_many_leads_to_wrong_bits(original: Path, change: Any, verify: Any) -> None:
    check(original, change, verify)
