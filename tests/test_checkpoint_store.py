"""The store of checkpoints: every bit comes back, in any layout; whatever fails, a whole checkpoint is there."""

from __future__ import annotations

import enum
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import threading
import zlib
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainloop import CheckpointError
from trainloop.checkpoint import Checkpoint, CheckpointStore, Content, FileSystem, KeepInterval, KeepPrevious
from trainloop.checkpoint.disk import fs as fs_module
from trainloop.checkpoint.format.boxes import are_exact_cover
from trainloop.checkpoint.format.layout import MANIFEST, TABLES, VERSION, parse_manifest
from trainloop.checkpoint.format.nested import decode, encode
from trainloop.checkpoint.save.snapshot import Buffers, Draft, Output
from trainloop.checkpoint.save.writer import write_draft
from trainloop.checkpoint.sharding import split_by_bytes

from .launching import REPOSITORY, launch
from .workers.checkpoint_store import (
    ABOUT,
    assert_holds,
    bits,
    files_of,
    folder_of,
    in_child,
    latest,
    names,
    saved,
    small,
)

WORKER = REPOSITORY / "tests" / "workers" / "checkpoint_store.py"
FORMS = ("single", "ddp2", "fsdp2", "fsdp3")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


# ---------------------------------------------------------------------- what is saved comes back


def odd_tensors() -> dict[str, torch.Tensor]:
    """One of each kind that tensors of a model or optimizer may be."""
    flat = torch.randn(10)
    shared = torch.randn(3, 4)
    return {
        "tied": shared,
        "tied.again": shared,
        "left": flat[:5],
        "right": flat[5:],
        "overlapping": flat[2:7],
        "transposed": torch.randn(4, 3).t(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800000, -(2**31)], dtype=torch.int32).view(torch.float32),
        "bfloat16": torch.randn(7).bfloat16(),
        "half": torch.randn(7).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "int64": torch.tensor([2**62, -1]),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint16": torch.tensor([65535], dtype=torch.uint16),
        "bool": torch.tensor([[True], [False]]),
        "complex": torch.randn(3, 2, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex128).conj(),
        "complex.scalar": torch.tensor(1 + 2j),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("save", ["save", "save_async"])
def test_tensors_of_every_kind_come_back_bit_by_bit(root: Path, save: str) -> None:
    """Any dtype, shape, view or NaN that goes in comes out, from both kinds of groups."""
    tensors = odd_tensors()
    store = CheckpointStore(root)
    getattr(store, save)(1, Content({"model": tensors}, {"optim": tensors, "none": {}}), **ABOUT)
    store.close()
    checkpoint = latest(root)
    for group in ("model", "optim"):
        assert checkpoint.tensors(group) == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        got = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
        checkpoint.read_into(group, got)
        assert {n: bits(t) for n, t in got.items()} == {n: bits(t.detach().resolve_conj()) for n, t in tensors.items()}
    assert checkpoint.tensors("none") == {}


def test_tied_tensors_are_written_once_and_others_never_dropped(root: Path) -> None:
    """Only the same view of the same memory counts as tied; a part of it is a tensor of its own."""
    CheckpointStore(root).save(1, Content({"model": odd_tensors()}), **ABOUT)
    checkpoint = latest(root)
    aliases = {n: r.alias_of for n, r in checkpoint.manifest.tensors["model"].items() if r.alias_of}
    assert aliases == {"tied.again": "tied"}
    stored = load_file(checkpoint.folder / "model" / "model.safetensors")
    assert stored.keys() == odd_tensors().keys() - {"tied.again"}


JSON_STATE: dict[str, Any] = {
    "step": 3,
    "big": 2**127 + 1,
    "floats": [0.1, -0.0, 1e-320, math.inf, -math.inf],
    "nothing": None,
    "flags": {True: 1, False: 0},
    "milestones": {3: 0.1, -7: {"x": []}},
    "mixed": {1: "a", "1": "b", None: "c", 0.5: "d"},
    "$float": {"$items": [1], "$": 2},
    "empty": [{}, [], ""],
}


def test_nested_state_comes_back(root: Path) -> None:
    """Keys that are no strings, infinities, big integers, look-alikes of our own tags and tensors in the depth."""
    state = {**JSON_STATE, "rng": [torch.get_rng_state(), {"x": torch.tensor(2.0), "c": torch.randn(2).cfloat()}]}
    state |= {"a": {"b": torch.tensor(1)}, "a/b": torch.tensor(2), "tuple": (1, (2,)), "nan": math.nan}
    CheckpointStore(root).save(1, Content(global_state=state, rank_state=[state]), **ABOUT)
    checkpoint = latest(root)
    for got in (checkpoint.global_state(), checkpoint.rank_state(0)[0]):
        assert {key: got[key] for key in JSON_STATE} == JSON_STATE
        assert math.copysign(1, got["floats"][1]) == -1
        assert bits(got["rng"][0]) == bits(state["rng"][0])
        assert bits(got["rng"][1]["c"]) == bits(state["rng"][1]["c"])
        assert (got["a"]["b"], got["a/b"], got["rng"][1]["x"]) == (torch.tensor(1), torch.tensor(2), torch.tensor(2.0))
        assert got["tuple"] == (1, (2,))
        assert math.isnan(got["nan"])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
KEYS = SCALARS | st.sampled_from(["$float", "$"])
STATES = st.recursive(
    SCALARS | st.builds(np.float32, st.floats(width=32, allow_nan=False)) | st.builds(np.int64, st.integers(0, 9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(4, 9))
        | st.sets(SCALARS, max_size=3)
        | st.frozensets(SCALARS, max_size=3)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
        | st.dictionaries(KEYS, inner).map(lambda items: defaultdict(list, items))
        | st.dictionaries(KEYS, st.integers()).map(Counter)
    ),
    max_leaves=20,
)


@given(STATES)
def test_any_nested_state_survives_strict_json(state: Any) -> None:
    """Encoded state is JSON as the standard has it, and decodes to what it was, types included."""
    encoded, tensors = encode(state)
    text = json.dumps(encoded, allow_nan=False)
    assert not tensors
    decoded = decode(json.loads(text), {})
    assert decoded == state
    assert _typed(decoded) == _typed(state)


def _typed(state: Any) -> Any:
    """Every value with its type; the elements of a set in no order."""
    if isinstance(state, Mapping):
        factory = getattr(state, "default_factory", None)
        return type(state), factory, [(_typed(key), _typed(value)) for key, value in state.items()]
    if isinstance(state, set | frozenset):
        return type(state), {repr(item) for item in state}
    if isinstance(state, list | tuple | deque):
        return type(state), getattr(state, "maxlen", None), [_typed(item) for item in state]
    return type(state), repr(state)


class Color(enum.IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, {"b": object}]}, r"at a/1/b there is a value .*object.*\(type\)"),
        ({"a": {(1, 2): 3}}, r"at a there is a key \(1, 2\) \(tuple\)"),
        (object(), r"at its root there is a value .*\(object\)"),
        ({"a": {"b": np.zeros(2)}}, r"at a/b there is a value .*\(ndarray\)"),
        ({"a": [Pair(1, 2)]}, r"at a/0 there is a value .*\(Pair\)"),
        ({"a": Color.RED}, r"at a there is a value .*\(Color\)"),
        ({"a": defaultdict(lambda: 3)}, r"at a there is a value .*\(defaultdict\)"),
        ({"a": torch.empty(1, device="meta")}, "a is on the meta device"),
        ({"a": torch.zeros(2).to_sparse()}, "a must be dense to be saved, but its layout is torch.sparse_coo"),
    ],
)
def test_state_that_cannot_be_stored_is_refused_by_its_place(root: Path, state: Any, message: str) -> None:
    """What would need a pickle is an error that says where it is, and nothing is left on the disk."""
    saved(root, 1)
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(root).save(2, Content(global_state=state), **ABOUT)
    assert names(root) == ["latest", "step_0000001"]


@pytest.mark.parametrize("group", ["state", "a/b", "..", ""])
def test_names_of_groups_are_those_of_folders(root: Path, group: str) -> None:
    """A group whose name is no folder's of its own is refused before anything is written."""
    with pytest.raises(CheckpointError, match="Names of groups must be different identifiers"):
        CheckpointStore(root).save(1, Content({group: {}}), **ABOUT)


def test_a_checkpoint_is_json_and_safetensors(root: Path) -> None:
    """No file needs a pickle, the weights are read by safetensors, and small texts lie where they were wanted."""
    content = small(1)
    content.rank_state = {"x": torch.zeros(2)}
    CheckpointStore(root).save(1, content, **ABOUT, extra={"model/config.json": "{}"}, metrics={"val": {"loss": 0.5}})
    folder = folder_of(root, 1)
    assert files_of(folder) == [
        "manifest.json",
        "model/config.json",
        "model/model.safetensors",
        "optim/rank_00000.safetensors",
        "state/global.json",
        "state/rank_00000.json",
        "state/rank_00000.safetensors",
        "tables.json",
    ]
    weights = load_file(folder / "model" / "model.safetensors")
    assert {n: bits(t) for n, t in weights.items()} == {n: bits(t) for n, t in content.weights["model"].items()}
    assert all((folder / path).stat().st_mode & 0o444 == 0o444 for path in files_of(folder))
    assert os.readlink(root / "latest") == "step_0000001"
    (info,) = CheckpointStore(root).checkpoints()
    assert (info.step, info.seq, info.run_id, info.world_size, info.health) == (1, 1, "run", 1, True)
    assert info.metrics == {"val/loss": 0.5}
    assert info.num_bytes == sum((folder / path).stat().st_size for path in files_of(folder)[1:-1])


@pytest.mark.parametrize("path", ["manifest.json", "tables.json", "state/global.json", "../x", "/x"])
def test_extra_texts_have_free_places(root: Path, path: str) -> None:
    """A text that would overwrite a file, or lie outside, is refused."""
    with pytest.raises(CheckpointError, match="`extra` must have free paths inside the checkpoint"):
        CheckpointStore(root).save(1, small(1), **ABOUT, extra={path: ""})


def test_from_pretrained_reads_the_weights(root: Path) -> None:
    """`model/` with a config beside is a model folder of transformers, tied weights included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6)
    model = transformers.GPT2LMHeadModel(config)
    content = Content({"model": model.state_dict()})
    CheckpointStore(root).save(1, content, **ABOUT, extra={"model/config.json": config.to_json_string()})
    again = transformers.GPT2LMHeadModel.from_pretrained(folder_of(root, 1) / "model")
    assert {n: bits(t) for n, t in again.state_dict().items()} == {n: bits(t) for n, t in model.state_dict().items()}


# ---------------------------------------------------------------------- reading into tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"x{i}": t["w1"] for i in range(7)}), "7 not in the checkpoint: x0, x1, x2, x3, x4, and"),
        (lambda t: t.pop("w2"), r"1 only in the checkpoint: w2\."),
        (lambda t: t.update(w1=torch.zeros(3)), r"w1 is float32 \[101\] there, but float32 \[3\] here"),
        (lambda t: t.update(w1=torch.zeros(101).double()), r"w1 is float32 \[101\] there, but float64 \[101\] here"),
    ],
)  # fmt: skip
def test_targets_are_checked_before_they_are_touched(root: Path, change: Callable[[Any], Any], message: str) -> None:
    """Wrong names, shapes and dtypes are told by name, and no tensor has changed."""
    checkpoint = latest(saved(root, 5))
    targets = {f"w{i}": torch.zeros(100 + i) for i in range(4)}
    change(targets)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_into("model", targets)
    assert not any(bool(tensor.any()) for tensor in targets.values())


def test_an_unknown_group_is_told_with_the_known(root: Path) -> None:
    """Asking for a group that was not saved names those that were."""
    with pytest.raises(CheckpointError, match='no tensors in a group "ema"; its groups: model, optim'):
        latest(saved(root, 1)).tensors("ema")


@given(st.data())
def test_cover_is_exact(data: st.DataObject) -> None:
    """Any cutting of a tensor into boxes covers it; without one of them, or with one twice, it does not."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 5)) if shape else 0):
        begin, extent = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, extent[dim]))
        second = tuple(b + cut * (d == dim) for d, b in enumerate(begin))
        boxes += [
            (begin, tuple(cut if d == dim else n for d, n in enumerate(extent))),
            (second, tuple(n - cut if d == dim else n for d, n in enumerate(extent))),
        ]
    assert are_exact_cover(boxes, shape)
    victim = data.draw(st.sampled_from(boxes))
    if math.prod(victim[1]):
        assert not are_exact_cover([box for box in boxes if box != victim], shape)
        assert not are_exact_cover([*boxes, victim], shape)
        assert not shape or not are_exact_cover(boxes, (shape[0] + 1, *shape[1:]))


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 6))
def test_parts_are_balanced(sizes: list[int], num_parts: int) -> None:
    """No part is larger than the mean by more than the largest item, and the empty parts come last."""
    parts = split_by_bytes(sizes, num_parts)
    totals = [sum(size for size, part in zip(sizes, parts, strict=True) if part == p) for p in range(num_parts)]
    assert max(totals) <= sum(sizes) / num_parts + max(sizes, default=0)
    assert sorted(set(parts)) == list(range(len(set(parts))))


# ---------------------------------------------------------------------- which one is loaded


def test_nothing_at_all_is_none(root: Path) -> None:
    """Only a folder without any checkpoint lets a run start fresh."""
    assert CheckpointStore(root).resolve("latest") is None
    store = CheckpointStore(root)
    store.open()
    assert store.resolve("latest") is None
    store.close()


def test_the_last_commit_is_the_latest(root: Path) -> None:
    """After a roll-back the lower step is newer; a step saved again replaces the old one and is the newest."""
    assert_holds(latest(saved(root, 10, 20, 5)), 5)
    assert_holds(latest(saved(root, 10)), 10)
    assert [info.step for info in CheckpointStore(root).checkpoints()] == [20, 5, 10]
    assert names(root) == ["latest", "step_0000005", "step_0000010", "step_0000020"]


def test_one_is_found_by_step_and_by_path(root: Path, tmp_path: Path) -> None:
    """A step, its folder, and the link `latest` lead to the checkpoint; also a copy that lies elsewhere."""
    saved(root, 10, 20)
    store = CheckpointStore(root)
    shutil.copytree(folder_of(root, 10), tmp_path / "best")
    for which, step in [(10, 10), (20, 20), (folder_of(root, 10), 10), (str(root / "latest"), 20)]:
        assert_holds(store.resolve(which), step)
    assert_holds(store.resolve(tmp_path / "best"), 10)
    assert_holds(Checkpoint.open(tmp_path / "best"), 10)
    with pytest.raises(CheckpointError, match="no checkpoint of step 15, only of: 10, 20"):
        store.resolve(15)
    with pytest.raises(ValueError, match="`verify` must be one of full, size, off, but is 'fast'"):
        store.resolve("latest", verify="fast")  # type: ignore[arg-type]


def test_a_healthy_one_is_preferred(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`latest` passes over newer ones with non-finite parameters and says so; if all are so, it is the newest."""
    saved(root, 10, 20, 30, health=lambda step: step == 10)
    assert_holds(latest(root), 10)
    assert "step_0000020, step_0000030 are not all finite. Loading step_0000010, the newest healthy one" in (
        caplog.messages[-1].replace("step_0000030, step_0000020", "step_0000020, step_0000030")
    )
    shutil.rmtree(folder_of(root, 10))
    assert_holds(latest(root), 30)
    assert "has no healthy checkpoint. Loading step_0000030" in caplog.messages[-1]


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 4])),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "removed": Path.unlink,
    "a folder": lambda path: path.rename(path.with_suffix(".old")) and path.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_leads_to_the_one_before(root: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    """Whatever happened to whichever file: `latest` falls back and names it; an explicit request raises and does."""
    saved(root, 10, 20)
    for path in files_of(folder_of(root, 20)):
        shutil.copytree(folder_of(root, 20), root / "kept")
        DAMAGES[damage](folder_of(root, 20) / path)
        caplog.clear()
        assert_holds(latest(root), 10)
        assert f"step_0000020: {path}" in caplog.text
        for which in (20, folder_of(root, 20)):
            with pytest.raises(CheckpointError, match=path):
                CheckpointStore(root).resolve(which)
        shutil.rmtree(folder_of(root, 20))
        (root / "kept").rename(folder_of(root, 20))
        assert_holds(latest(root), 20)


def test_any_flipped_bit_of_a_manifest_is_noticed(root: Path) -> None:
    """There is no byte of a manifest or of its tables that may change."""
    folder = folder_of(saved(root, 10), 10)
    texts = [(folder / name).read_text() for name in (MANIFEST, TABLES)]
    parse_manifest(*texts)
    rng = random.Random(0)
    for which, text in enumerate(texts):
        for position in range(len(text)):
            flipped = text[:position] + chr(ord(text[position]) ^ (1 << rng.randrange(7))) + text[position + 1 :]
            with pytest.raises(CheckpointError):
                parse_manifest(*(flipped if i == which else kept for i, kept in enumerate(texts)))


@pytest.mark.parametrize(("verify", "found"), [("full", 10), ("size", 20), ("off", 20)])
def test_verification_is_as_deep_as_asked(root: Path, verify: Any, found: int) -> None:
    """A flipped bit is found by reading all, a truncated file by its size, and "off" looks at manifests only."""
    saved(root, 10, 20)
    DAMAGES["flipped"](folder_of(root, 20) / "optim" / "rank_00000.safetensors")
    assert latest(root, verify=verify).manifest.step == found
    DAMAGES["truncated"](folder_of(root, 20) / "optim" / "rank_00000.safetensors")
    assert latest(root, verify=verify).manifest.step == (20 if verify == "off" else 10)


def test_all_damaged_is_an_error(root: Path) -> None:
    """Checkpoints that cannot be read never become a fresh start."""
    saved(root, 10, 20)
    (folder_of(root, 10) / "manifest.json").unlink()
    (folder_of(root, 20) / "state" / "global.json").unlink()
    message = r"All checkpoints in .* are damaged: (?=.*step_0000010: manifest.json is missing)"
    with pytest.raises(CheckpointError, match=message + ".*step_0000020: state/global.json is missing"):
        CheckpointStore(root).resolve("latest")


def test_a_folder_that_was_renamed_is_not_another_step(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A manifest in the folder of another step is not believed."""
    saved(root, 10, 20)
    folder_of(root, 20).rename(folder_of(root, 99))
    assert_holds(latest(root), 10)
    assert "step_0000099: manifest.json is that of step 20" in caplog.text


def test_a_newer_format_is_not_taken_for_damage(root: Path) -> None:
    """What a later trainloop wrote is an error with the remedy, never a reason to fall back or to write beside it."""
    from trainloop.checkpoint.format import layout

    saved(root, 10, 20)
    path = folder_of(root, 20) / "manifest.json"
    body = path.read_text().replace(f'"version": {VERSION}', f'"version": {VERSION + 1}')
    path.write_text(layout._sealed(body[: body.rfind('"crc32": ')]))
    for which in ("latest", 20):
        with pytest.raises(CheckpointError, match=f"version {VERSION + 1} of the format.*Update trainloop"):
            CheckpointStore(root).resolve(which)
    with pytest.raises(CheckpointError, match="Update trainloop"):
        CheckpointStore(root).save(30, small(30), **ABOUT)


# ---------------------------------------------------------------------- what is not ours


def foreign_folders(path: Path) -> dict[str, str]:
    """Writes what other software writes; by name what it must be called."""
    model = torch.nn.Linear(2, 2)
    script = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from accelerate import Accelerator
import torch.distributed.checkpoint as dcp
model = torch.nn.Linear(2, 2)
dcp.save(model.state_dict(), checkpoint_id=sys.argv[1] + "/dcp")
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
accelerator.save_state(sys.argv[1] + "/accelerate")
"""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True)
    torch.save(model.state_dict(), path / "file.pt")
    save_file(model.state_dict(), path / "file.safetensors")
    (path / "torch").mkdir()
    shutil.copy(path / "file.pt", path / "torch" / "model.pt")
    for name, file in (("transformers", "config.json"), ("trainer", "trainer_state.json")):
        (path / name).mkdir()
        shutil.copy(path / "file.safetensors", path / name / "model.safetensors")
        (path / name / file).write_text("{}")
    (path / "empty").mkdir()
    (path / "other").mkdir()
    (path / "other" / "notes.txt").write_text("")
    saved(path / "root", 1)
    return {
        "accelerate": "looks like an `accelerator.save_state` folder",
        "dcp": r"looks like a torch.distributed.checkpoint \(DCP\) folder",
        "transformers": "looks like a transformers model folder, which `from_pretrained` reads",
        "trainer": "looks like a checkpoint of transformers' Trainer",
        "file.pt": "looks like a torch.save file, which `torch.load` reads",
        "file.safetensors": "looks like a safetensors file",
        "torch": "holds a torch.save file",
        "empty": "is empty",
        "other": "has no manifest.json, only: notes.txt",
        "root": "holds checkpoints; give one of them: step_0000001",
        "nowhere": "does not exist",
    }


def test_what_is_not_ours_is_called_by_its_name(tmp_path: Path) -> None:
    """The error for a folder of other software says what it looks like and what reads it; no run starts anew there."""
    for name, message in foreign_folders(tmp_path).items():
        with pytest.raises(CheckpointError, match=f"{name} is not a checkpoint of trainloop: it {message}"):
            CheckpointStore(tmp_path / "root").resolve(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path / name)
    for name in ("accelerate", "dcp", "trainer"):
        with pytest.raises(CheckpointError, match=r"looks like .* has no checkpoint of trainloop"):
            CheckpointStore(tmp_path / name).resolve("latest")
    with pytest.raises(CheckpointError, match=r"looks like .* has no checkpoint of trainloop"):
        CheckpointStore(tmp_path).resolve("latest")
    assert CheckpointStore(tmp_path / "other").resolve("latest") is None


# ---------------------------------------------------------------------- one run a folder


def test_a_second_run_is_told_who_has_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs never write into one folder; the error names the process. After `close` the next one may."""
    monkeypatch.setattr("trainloop.checkpoint.disk.lock._PATIENCE_SECONDS", 0.1)
    first = CheckpointStore(root)
    first.open()
    with pytest.raises(CheckpointError, match=f"in use by another run \\(process {os.getpid()} on "):
        CheckpointStore(root).open()
    assert CheckpointStore(root).resolve("latest") is None  # reading needs no lock
    first.close()
    CheckpointStore(root).open()


def test_the_lock_ends_with_the_process_that_holds_it(root: Path) -> None:
    """A killed run leaves no lock, and a worker that it forked does not keep it."""
    store = CheckpointStore(root)
    store.open()
    may_end = multiprocessing.get_context("fork").Event()
    worker = multiprocessing.get_context("fork").Process(target=may_end.wait, args=(60,))
    worker.start()
    store.close()

    def take_and_die() -> None:
        CheckpointStore(root).open()
        os._exit(9)

    assert in_child(take_and_die) == 9
    again = CheckpointStore(root)
    again.open()
    assert worker.is_alive()
    may_end.set()
    worker.join()
    again.close()


# ---------------------------------------------------------------------- saving in the background


class Held(FileSystem):
    """A disk on which nothing is written before `go` is set, and nothing removed before `may_remove` is."""

    def __init__(self) -> None:
        self.go, self.may_remove, self.would_remove = threading.Event(), threading.Event(), threading.Event()
        self.may_remove.set()

    def write(self, path: Path, buffers: Iterable[Any], sync: bool = True) -> None:
        assert self.go.wait(60)
        super().write(path, buffers, sync)

    def remove_tree(self, path: Path) -> None:
        self.would_remove.set()
        assert self.may_remove.wait(60)
        super().remove_tree(path)


def test_an_async_save_holds_what_was_there_at_the_call(root: Path) -> None:
    """It returns before anything is written, and what training changes after the return is not in it."""
    fs = Held()
    store = CheckpointStore(root, fs=fs)
    content = small(1)
    content.rank_state = {"x": torch.ones(3)}
    store.save_async(1, content, **ABOUT)
    assert store.busy()
    for tensors in content.groups().values():
        for tensor in tensors.values():
            tensor.fill_(7)
    content.rank_state["x"].fill_(7)
    content.global_state["step"] = 7
    assert store.checkpoints() == []
    fs.go.set()
    store.wait()
    assert not store.busy()
    checkpoint = latest(root)
    weights = load_file(checkpoint.folder / "model" / "model.safetensors")
    assert all(bool((tensor == 1).all()) for tensor in weights.values())
    assert checkpoint.global_state() == {"step": 1}
    assert checkpoint.rank_state(0)["x"].tolist() == [1, 1, 1]
    store.close()


def test_saves_follow_one_another(root: Path) -> None:
    """A save waits for the one in flight, and so do a search and the end."""
    fs = Held()
    store = CheckpointStore(root, fs=fs)
    for step, save in ((1, store.save_async), (2, store.save_async), (3, store.save)):
        threading.Timer(0.1, fs.go.set).start()
        save(step, small(step), **ABOUT, retention=[KeepInterval(1)])
        assert [info.step for info in store.checkpoints()] == list(range(1, step + (step == 3)))
        fs.go.clear()
    store.save_async(4, small(4), **ABOUT)
    threading.Timer(0.1, fs.go.set).start()
    assert_holds(store.resolve("latest"), 4)
    fs.go.clear()
    store.save_async(5, small(5), **ABOUT)
    threading.Timer(0.1, fs.go.set).start()
    store.close()
    assert_holds(latest(root), 5)


def test_a_save_does_not_wait_until_the_old_ones_are_removed(root: Path) -> None:
    """It returns when the new one is durable; the next save, and the end, wait for the removal."""
    fs = Held()
    fs.go.set()
    store = CheckpointStore(root, fs=fs)
    store.save(1, small(1), **ABOUT)
    fs.may_remove.clear()
    store.save(2, small(2), **ABOUT)
    assert_holds(latest(root), 2)
    assert fs.would_remove.wait(60)
    assert len([name for name in names(root) if name.startswith(".trash")]) == 1
    threading.Timer(0.3, fs.may_remove.set).start()
    store.save(3, small(3), **ABOUT)
    assert fs.may_remove.is_set()
    store.close()
    assert names(root) == ["latest", "step_0000003"]


def test_an_async_failure_is_raised_once_by_wait(root: Path) -> None:
    """`failed` tells of it, `wait` raises it, a later save works, and `close` raises what nobody has asked for."""
    store = CheckpointStore(saved(root, 1))
    for ask in (store.wait, store.close):
        store.save_async(2, small(2), **ABOUT, extra={"../x": ""})
        while store.busy():
            pass
        assert store.failed()
        with pytest.raises(CheckpointError, match=r"step 2 was not saved.*`extra` must have"):
            ask()
        assert not store.failed()
        assert_holds(store.resolve("latest"), 1)
    store.save_async(3, small(3), **ABOUT)
    store.wait()
    assert_holds(store.resolve("latest"), 3)
    store.close()


def test_memory_of_snapshots_is_used_again() -> None:
    """The second snapshot takes the first one's memory, and a tensor that is gone leaves none behind."""
    buffers = Buffers()
    pointers = []
    for _ in range(2):
        buffers.start()
        pointers.append([buffers.hold(key, torch.zeros(100), copy=True).data_ptr() for key in "abc"])
        buffers.finish()
    assert pointers[0] == pointers[1]
    buffers.start()
    changed = buffers.hold("a", torch.zeros(5), copy=True)
    assert changed.shape == (5,)
    live = torch.zeros(100)
    assert buffers.hold("b", live, copy=False) is live
    buffers.finish()
    assert set(buffers._held) == {"a"}
    assert not buffers._spare


def test_what_is_written_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a piece ends, in a buffer or after it, and also where the disk cannot be told to begin."""
    monkeypatch.setattr(fs_module, "_AHEAD", 10)
    buffers = [bytes(range(i, i + n)) for i, n in enumerate([0, 3, 10, 7, 31, 1, 20, 0])]
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, length, __: told.append((offset, length)), raising=False)
    FileSystem().write(tmp_path / "told", buffers)
    assert (tmp_path / "told").read_bytes() == b"".join(buffers)
    assert sum(length for _, length in told) > 60
    assert all(offset == sum(length for _, length in told[:i]) for i, (offset, _) in enumerate(told))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    FileSystem().write(tmp_path / "refused", buffers)
    monkeypatch.delattr(os, "posix_fadvise")
    FileSystem().write(tmp_path / "unknown", buffers)
    assert (tmp_path / "refused").read_bytes() == (tmp_path / "unknown").read_bytes() == b"".join(buffers)


# ---------------------------------------------------------------------- room and retention


class Small(FileSystem):
    """A disk with little room."""

    def free_bytes(self, path: Path) -> int:
        return 2**20 + 4000


def test_space_is_looked_for_first(root: Path) -> None:
    """A checkpoint that has no room is an error with both numbers, before anything is written."""
    saved(root, 1)
    store = CheckpointStore(root, fs=Small())
    content = small(2)
    content.weights["ema"] = {"w": torch.zeros(2**20)}  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"it needs 5.0 MiB, but the disk of .* has 1.0 MiB free"):
        store.save(2, content, **ABOUT)
    assert names(root) == ["latest", "step_0000001"]
    store.save(2, small(2), **ABOUT)
    store.wait()
    assert names(root) == ["latest", "step_0000002"]


def test_policies_rule_the_disk(root: Path) -> None:
    """After each commit the disk holds what the policies want, the newest and the newest healthy one."""
    store = CheckpointStore(root)
    for step in range(1, 8):
        store.save(step, small(step, step < 4), run_id="r", retention=[KeepInterval(5), KeepPrevious(1)])
    store.wait()
    assert [info.step for info in store.checkpoints()] == [3, 5, 6, 7]
    store.close()


class Broken:
    """A policy with a mistake in it."""

    def keep(self, manifests: Sequence[Any]) -> set[int]:
        raise KeyError("val/los")


def test_a_policy_that_fails_costs_no_checkpoint(root: Path) -> None:
    """It is told by `wait`, whoever writes, and says what is safe."""
    store = CheckpointStore(root)
    for step, save in ((1, store.save), (2, store.save_async)):
        save(step, small(step), **ABOUT, retention=[Broken()])
        with pytest.raises(
            CheckpointError, match=rf"step {step} is saved, but old checkpoints .*KeyError\('val/los'\)"
        ):
            store.wait()
    assert [info.step for info in store.checkpoints()] == [1, 2]
    store.close()


def test_a_damaged_one_takes_nobodys_place(root: Path) -> None:
    """One that was found damaged neither counts for a policy nor is removed, until its step is saved again."""
    saved(root, 10, 20, 30)
    DAMAGES["flipped"](folder_of(root, 30) / "model" / "model.safetensors")
    store = CheckpointStore(root)
    assert_holds(store.resolve("latest"), 20)
    store.save(25, small(25), **ABOUT, retention=[KeepPrevious(1)])
    store.wait()
    assert names(root) == ["latest", "step_0000020", "step_0000025", "step_0000030"]
    store.save(30, small(30), **ABOUT, retention=[KeepPrevious(1)])
    store.wait()
    assert names(root) == ["latest", "step_0000025", "step_0000030"]
    assert_holds(store.resolve("latest"), 30)
    store.close()


# ---------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def saved_by_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each form of launch."""
    folder = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        launch(WORKER, form, "save", str(folder), form)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_reads_every_other_bit_by_bit(saved_by_all: Path, form: str) -> None:
    """Weights, buffers and optimizer state that were saved in each form are the same bits in this one."""
    launch(WORKER, form, "load", str(saved_by_all), form)


@pytest.mark.slow
def test_replicas_of_shards_are_read_as_well(saved_by_all: Path, tmp_path: Path) -> None:
    """HSDP saves what others read, and reads what others saved; all replicas write, and each byte is written once."""
    folder = tmp_path / "forms"
    shutil.copytree(saved_by_all, folder, symlinks=True)
    launch(WORKER, "hsdp2x2", "save", str(folder), "hsdp2x2")
    for form in ("hsdp2x2", "single"):
        launch(WORKER, form, "load", str(folder), form)
    sizes = [
        sum(tensor.nbytes for tensor in load_file(path).values())
        for path in sorted((folder / "hsdp2x2" / "step_0000007" / "optim").iterdir())
    ]
    checkpoint = Checkpoint.open(folder / "hsdp2x2" / "step_0000007")
    assert sum(sizes) == sum(r.num_bytes() for r in checkpoint.manifest.tensors["optim"].values())
    assert len(sizes) == 4
    assert max(sizes) < 0.5 * sum(sizes)


def test_weights_of_several_ranks_are_one_model(saved_by_all: Path) -> None:
    """Parts and their index are those that Hugging Face's libraries write: each tensor in the part it is said to be."""
    folder = saved_by_all / "fsdp3" / "step_0000007" / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    parts = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert sorted(parts) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {name: part for part, tensors in parts.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in parts.values() for t in tensors.values())


def test_copies_from_a_device_are_waited_for_before_they_are_read(root: Path) -> None:
    """Copies from a device may still be on their way when the snapshot is taken: what is written, its checksum and the
    health check are of the values that arrive.
    """
    late = torch.zeros(4)
    draft = Draft(
        outputs={"model/model.safetensors": Output(tensors={"w": late})},
        must_be_finite={"model/w": late},
        wait_for_copies=lambda: late.copy_(torch.tensor([1.0, 2.0, 3.0, math.inf])),
    )
    written = write_draft(FileSystem(), root, draft)
    assert load_file(root / "model" / "model.safetensors")["w"].tolist() == [1.0, 2.0, 3.0, math.inf]
    assert written.non_finite
    data = (root / "model" / "model.safetensors").read_bytes()
    assert written.files["model/model.safetensors"].crc32 == zlib.crc32(data)
