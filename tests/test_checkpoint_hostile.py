"""Checkpoints that somebody has tampered with, seals made anew: each load ends in the right bits, in another checkpoint
or in a CheckpointError, soon, and reads nothing that lies outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainloop import CheckpointError
from trainloop.checkpoint import Checkpoint, CheckpointStore, Content
from trainloop.checkpoint.format import layout, limits, tensorfile
from trainloop.checkpoint.format.boxes import are_exact_cover
from trainloop.checkpoint.load import loading
from trainloop.checkpoint.load.reader import RemovedError

from .folders import Quick, once
from .launching import REPOSITORY
from .tampering import change_header, replace_by_fifo, replace_by_link, reseal, set_to
from .workers.checkpoint_store import ABOUT, assert_holds, folder_of, latest, saved, small

WEIGHTS, SHARDS, STATE = "model/model.safetensors", "optim/rank_00000.safetensors", "state/global.json"
SECRET = "secret"
"""Of a file that lies beside the checkpoints."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, of which the tests tamper with the newer, and a file outside."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / SECRET).write_text(SECRET)
    return saved(tmp_path / "checkpoints", 10, 20)


def assert_passed_over(root: Path, caplog: pytest.LogCaptureFixture, told: str) -> None:
    """`latest` loads the one before and says why; by step and by path the load is an error that says the same."""
    caplog.clear()
    assert_holds(latest(root), 10)
    assert told in caplog.text
    for which in (20, folder_of(root, 20)):
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore(root).resolve(which)
        assert told in str(caught.value)


# ---------------------------------------------------------------------- what is no regular file inside


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", ["manifest.json", WEIGHTS, STATE])
@pytest.mark.parametrize("verify", ["full", "size", "off"])
def test_what_would_block_or_never_end_is_not_opened(root: Path, path: str, verify: Any) -> None:
    """A FIFO in place of any file is damage, and no load waits for it; nor for a device that a link leads to."""
    replace_by_fifo(folder_of(root, 20) / path)
    for again in (False, True):
        if verify != "off" or path == "manifest.json":
            assert_holds(latest(root, verify=verify), 10)
        else:
            with pytest.raises(CheckpointError, match=r"is not a regular file|is a link"):
                assert_holds(latest(root, verify=verify), 20)
        if not again:
            (folder_of(root, 20) / path).unlink()
            (folder_of(root, 20) / path).symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "path", ["/dev/zero", "../../outside/secret", "model/../../x", "./x", "model//x", "x\0", "\ud800", ""]
)
def test_files_are_named_inside(root: Path, caplog: pytest.LogCaptureFixture, path: str) -> None:
    """A manifest whose files lie elsewhere, or cannot be named, is damaged."""
    reseal(folder_of(root, 20), lambda content: content["files"].update({path: {"num_bytes": 2**62, "crc32": 0}}))
    assert_passed_over(root, caplog, "tables.json is damaged: ")


@pytest.mark.parametrize("part", ["model", WEIGHTS, "manifest.json"])
def test_links_are_not_followed(root: Path, caplog: pytest.LogCaptureFixture, part: str) -> None:
    """A file or folder that is a link is damage, also where the link leads to the right bytes."""
    replace_by_link(folder_of(root, 20) / part, root.parent / "outside" / "target")
    assert_passed_over(root, caplog, "it is a link, and links in a checkpoint are not followed")


@pytest.mark.parametrize("file", ["../../outside/x.safetensors", "/{outside}/x.safetensors", "model/other.safetensors"])
def test_a_tensor_lies_in_a_file_that_was_verified(root: Path, caplog: pytest.LogCaptureFixture, file: str) -> None:
    """A chunk whose file is not among `files` is damage: its bytes were never compared with a checksum."""
    outside = root.parent / "outside"
    shutil.copy(folder_of(root, 20) / WEIGHTS, outside / "x.safetensors")
    shutil.copy(folder_of(root, 20) / WEIGHTS, folder_of(root, 20) / "model" / "other.safetensors")
    named = file.format(outside=str(outside)[1:])
    reseal(folder_of(root, 20), set_to(named, "tensors", "model", "w0", "file"))
    assert_passed_over(root, caplog, "which is none of the checkpoint's files")


# ---------------------------------------------------------------------- what a manifest and a header may say


W0, M = ("tensors", "model", "w0"), ("tensors", "optim", "m")


def in_chunks(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of `w0` after its record lists its parts, of which there is one."""

    def apply(content: Any) -> None:
        record = content["tensors"]["model"]["w0"]
        record["chunks"] = [{"file": record.pop("file"), "offset": [0], "shape": [100]}]
        change(content)

    return apply


def cut(*cuts: Any, first: Any = 0, shape: Any = (50,)) -> Callable[[Any], Any]:
    """`m`, which is 50 floats in the file of rank 0, with a rule for its parts."""
    return set_to({"dtype": "float32", "shape": shape, "first": first, "cuts": list(cuts)}, *M)


MANIFESTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no chunks": (in_chunks(set_to([], *W0, "chunks")), "w0 does not make up its shape [100]"),
    "half covered": (in_chunks(set_to([50], *W0, "chunks", 0, "shape")), "w0 does not make up its shape [100]"),
    "outside": (in_chunks(set_to([1], *W0, "chunks", 0, "offset")), "w0 does not make up its shape [100]"),
    "dims": (in_chunks(set_to([10, 10], *W0, "shape")), "the chunks of w0 must have its 2 dimensions"),
    "negative": (set_to([-100], *W0, "shape"), "whole numbers from 0"),
    "huge": (set_to([2**62], *W0, "shape"), f"{WEIGHTS} is too small for its tensors"),
    "huge in chunks": (in_chunks(set_to([2**62], *W0, "shape")), "w0 does not make up its shape"),
    "dtype": (set_to("load", *W0, "dtype"), "w0 must have a dtype that can be stored, but has 'load'"),
    "wider": (set_to("float64", *W0, "dtype"), f"{WEIGHTS} is too small for its tensors"),
    "as wide": (set_to("int32", *W0, "dtype"), f"{WEIGHTS} is damaged: it has as float32 [100] 'w0', which should be"),
    "other group": (set_to(SHARDS, *W0, "file"), "which is none of the checkpoint's files of model"),
    "twice": (
        in_chunks(
            set_to([{"file": WEIGHTS, "offset": [at], "shape": [50]} for at in (0, 50)], *W0, "chunks"),
        ),
        "as 'w0', which is that of another tensor",
    ),
    "no such": (
        lambda content: content["tensors"]["model"].update(w9=content["tensors"]["model"].pop("w0")),
        f"{WEIGHTS} is damaged: it does not have 'w9'",
    ),
    "two places": (set_to([[0, 1, 1]], *W0, "cuts"), "`w0` must have the keys dtype, file, shape"),
    "no place": (lambda content: content["tensors"]["model"]["w0"].pop("file"), "`w0` must have the keys dtype, file"),
    "alias": (set_to({"alias_of": "w9"}, *W0), "model/w0 is stored under 'w9', which is no tensor that is stored"),
    "own alias": (set_to({"alias_of": "w0"}, *W0), "model/w0 is stored under 'w0', which is no tensor that is stored"),
    "cut no dimension": (cut([1, 50, 1]), "m of shape [50] cannot be cut by [1, 50, 1]"),
    "cut into no rows": (cut([0, 0, 1]), "m of shape [50] cannot be cut by [0, 0, 1]"),
    "cut on one rank": (cut([0, 25, 0]), "m of shape [50] cannot be cut by [0, 25, 0]"),
    "cut by text": (cut("0,1"), "must be a list of at most 64 whole numbers, but is '0,1'"),
    "no cuts": (cut(), "the cuts of m must be a list for a tensor with elements"),
    "cut of nothing": (cut([0, 1, 1], shape=[0]), "the cuts of m must be a list for a tensor with elements"),
    "cut for other ranks": (cut([0, 25, 1]), "m lies in 'optim/rank_00001.safetensors', which is none of the"),
    "first of other ranks": (cut([0, 50, 1], first=7), "m lies in 'optim/rank_00001.safetensors', which is none of"),
    "cut far away": (cut([0, 25, 2**62]), "m lies in 'optim/rank_00001.safetensors', which is none of the"),
    "cut too often": (cut([0, 1, 1], shape=[2**40]), "m is cut into more parts than there can be files"),
    "cut twice alike": (cut([0, 25, 1], [0, 5, 1]), "m is cut into more parts than there can be files"),
    "cut and huge": (cut([0, 2**40, 1], shape=[2**40]), "the files of optim are too small for its tensors"),
    "cut but other": (cut([0, 40, 1], shape=[40]), f"{SHARDS} is damaged: it has as float32 [50] 'm', which should be"),
    "missing key": (lambda content: content.pop("run_id"), "manifest.json is damaged: it has no 'run_id'"),
    "missing inner key": (
        lambda content: content["files"][WEIGHTS].pop("crc32"),
        "must have the keys crc32, num_bytes",
    ),
    "extra inner key": (set_to(1, *W0, "x"), "`w0` must have the keys dtype, file, shape"),
    "step": (set_to("20", "step"), "`step` must be a whole number from 0 "),
    "bool": (set_to(True, "seq"), "`seq` must be a whole number from 0 "),
    "group": (lambda content: content["tensors"].update(state={}), "an identifier as its name, but one has 'state'"),
    "more ranks": (set_to(2, "world_size"), "the nested state of the run, or of one of 2 ranks, is none of its files"),
    "ranks": (set_to(2**62, "world_size"), "the nested state of the run, or of one of"),
    "world size": (set_to(0, "world_size"), "`world_size` must be a whole number from 1 "),
    "health": (set_to("yes", "health"), "`health` must be true or false, but is 'yes'"),
    "time": (set_to(1e999, "time"), "Infinity is no number of JSON"),
    "nan": (set_to(float("nan"), "time"), "NaN is no number of JSON"),
    "tagged nan": (set_to({"$float": "nan"}, "time"), "`time` must be a number, but is {'$float': 'nan'}"),
    "metric": (set_to({"loss": "low"}, "metrics"), "`loss` must be a number, but is 'low'"),
    "large metric": (set_to({"loss": 10**400}, "metrics"), "manifest.json is damaged: int too large"),
    "tensor metric": (set_to({"$tensor": "x"}, "metrics"), "manifest.json is damaged: it has no 'x'"),
    "retention": (set_to([1], "retention"), "`retention` must be a list of policies"),
    "files": (set_to([], "files"), "`files` must be an object"),
    "tensors": (set_to({"model": 3}, "tensors"), "`model` must be an object"),
    "tables": (set_to(3, "tables"), "`tables` must be an object"),
    "other tables": (set_to({"num_bytes": 3, "crc32": 4}, "tables"), "tables.json is damaged: it has "),
    "no tables": (set_to({}, "tables"), "`tables` must have the keys crc32, num_bytes"),
    "version": (set_to("1", "version"), "`version` must be a whole number from 1 "),
    "versions": (set_to({"torch": 2}, "versions"), "`torch` must be a text"),
    "size": (set_to(2**64, "num_bytes"), "`num_bytes` must be a whole number from 0 "),
    "longer digits": (set_to(10**4000, "seq"), "`seq` must be a whole number from 0 "),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_cannot_be_is_damage(root: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Whatever a sealed manifest says: one that is not possible costs this checkpoint, and none of the others."""
    change, told = MANIFESTS[name]
    reseal(folder_of(root, 20), change)
    assert_passed_over(root, caplog, told)
    CheckpointStore(root).save(30, small(30), **ABOUT)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000, "", "\0", "null", "[]", "{}", "\ufeff{}", '{"format": ' + "9" * 5000 + "}"],
)
def test_a_text_that_is_no_manifest_is_damage(root: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Also where it is nested deeper than a parser can follow."""
    (folder_of(root, 20) / "manifest.json").write_text(text)
    assert_passed_over(root, caplog, "manifest.json is ")


HEADERS: dict[str, Callable[[Any], Any]] = {
    "one element": set_to({"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}, "w0"),
    "other dtype": set_to("I32", "w0", "dtype"),
    "other shape": set_to([10, 10], "w0", "shape"),
    "no such dtype": set_to("F31", "w0", "dtype"),
    "overlap": set_to([4, 404], "w0", "data_offsets"),
    "before": set_to([-400, 0], "w0", "data_offsets"),
    "far": set_to([2**62, 2**62 + 400], "w0", "data_offsets"),
    "one end": set_to([0], "w0", "data_offsets"),
    "no entry": set_to(None, "w0"),
    "left out": lambda entries: entries.pop("w0"),
    "deep": set_to(json.loads("[" * 500 + "]" * 500), "w0"),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("verify", ["full", "size", "off"])
def test_a_header_that_is_not_as_the_manifest_says_is_damage(
    root: Path, caplog: pytest.LogCaptureFixture, name: str, verify: Any
) -> None:
    """Shape and dtype in the file are compared before anything is written, with and without verification."""
    change_header(folder_of(root, 20) / WEIGHTS, HEADERS[name])
    reseal(folder_of(root, 20))
    if verify == "full":
        assert_passed_over(root, caplog, f"{WEIGHTS} is damaged: ")
        return
    checkpoint = latest(root, verify=verify)
    targets = {name: torch.zeros(100 + i) for i, name in enumerate(("w0", "w1", "w2", "w3"))}
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is damaged: "):
        checkpoint.read_into("model", targets)
    assert not any(bool(tensor.any()) for tensor in targets.values())


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "",
        "nan",
        '{"$tensor": "x"}',
        '{"$items": 3}',
        '{"$float": []}',
        '{"$items": [[[], 1]]}',
        '{"$numpy": ["int8", 1000]}',
        '{"$numpy": []}',
        '{"$deque": [[], 1e30]}',
        '{"$x": 1}',
        "\xff",
    ],
)
def test_nested_state_that_cannot_be_decoded_is_damage(root: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Also where its checksum is right; without verification it is an error when it is read."""
    (folder_of(root, 20) / STATE).write_bytes(text.encode("latin1"))
    reseal(folder_of(root, 20))
    assert_passed_over(root, caplog, f"{STATE} is damaged: ")
    with pytest.raises(CheckpointError, match=r"global\.json cannot be read"):
        latest(root, verify="off").global_state()


def test_nested_state_is_as_deep_as_can_be_read(root: Path) -> None:
    """At the limit it comes back; one level more is refused at the save."""
    store = CheckpointStore(root)
    for depth in (limits.MAX_JSON_DEPTH, limits.MAX_JSON_DEPTH + 1):
        for kind in (list, lambda items: {3: items[0]} if items else {}):
            state: Any = kind([])
            for _ in range(depth - 1):
                state = kind([state])
            content = Content(global_state=state)
            if depth > limits.MAX_JSON_DEPTH:
                with pytest.raises(CheckpointError, match="at most 100 levels of mappings and lists"):
                    store.save(30, content, **ABOUT)
            else:
                store.save(30, content, **ABOUT)
                assert latest(root).global_state() == state


@pytest.mark.parametrize("path", ["manifest.json", STATE])
def test_texts_are_read_up_to_a_limit(root: Path, path: str) -> None:
    """A file that claims to be larger is not read at all."""
    os.truncate(folder_of(root, 20) / path, limits.MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"has more than {limits.MAX_JSON_BYTES} bytes"):
        Checkpoint.open(folder_of(root, 20)).global_state()


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, limits.MAX_HEADER_BYTES + 1])
def test_headers_are_read_up_to_a_limit(root: Path, caplog: pytest.LogCaptureFixture, length: int) -> None:
    """A header that is longer than the format allows, or than its file, is damage."""
    path = folder_of(root, 20) / WEIGHTS
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    os.truncate(path, limits.MAX_HEADER_BYTES + 100)
    reseal(folder_of(root, 20))
    assert_passed_over(root, caplog, f"{WEIGHTS} is damaged: its header is not as safetensors has it")


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_TENSORS", 4, "would have 5 tensors, but can have 4 at most"),
        ("MAX_FILES", 3, "would have 4 files, but can have 3 at most"),
        ("MAX_JSON_BYTES", 200, "bytes, but can have 200 at most"),
    ],
)
def test_no_more_is_saved_than_can_be_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    """What a reader would not accept is refused at the save."""
    monkeypatch.setattr(layout, limit, value)
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(root).save(30, small(30), **ABOUT)


def test_a_header_that_could_not_be_read_is_not_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of too many tensors is refused at the save."""
    monkeypatch.setattr(tensorfile, "MAX_HEADER_BYTES", 100)
    with pytest.raises(CheckpointError, match="The header of a file of 4 tensors would have"):
        CheckpointStore(root).save(30, small(30), **ABOUT)


@pytest.mark.timeout(20)
def test_an_intricate_cutting_takes_no_time() -> None:
    """Boxes along the diagonal of a tensor with many dimensions make more cells than can be counted."""
    boxes = [((i,) * 20, (1,) * 20) for i in range(100)]
    assert not are_exact_cover(boxes, (100, *(1 for _ in range(19))))
    assert not are_exact_cover(boxes, (100,) * 20)
    halves = [
        ((0,) * 20, (50, *(100 for _ in range(19)))),
        ((50, *(0 for _ in range(19))), (50, *(100 for _ in range(19)))),
    ]
    assert are_exact_cover(halves, (100,) * 20)
    slivers = [((i, *(0 for _ in range(19))), (1, *(100 for _ in range(19)))) for i in range(100)]
    assert are_exact_cover(slivers, (100,) * 20)


# ---------------------------------------------------------------------- tensors that would not come back


def test_views_of_every_kind_are_filled(root: Path) -> None:
    """Expanded, conjugated, negated, transposed and strided tensors are saved, and come back into tensors like them."""

    def views() -> dict[str, torch.Tensor]:
        complex_ = torch.randn(4, dtype=torch.complex64)
        return {
            "expanded": torch.randn(1).expand(5),
            "rows": torch.randn(1, 3).expand(4, 3),
            "columns": torch.randn(3, 1).expand(3, 4),
            "nan": torch.tensor([float("nan")]).expand(2),
            "conjugate": complex_.conj(),
            "negative": complex_.conj().imag,
            "transposed": torch.randn(3, 5).t(),
            "strided": torch.randn(10)[::3],
            "windows": torch.randn(6).unfold(0, 3, 1),
        }

    tensors = views()
    CheckpointStore(root).save(30, Content({"model": tensors}, {"optim": tensors}), **ABOUT)
    for group in ("model", "optim"):
        targets = views()
        latest(root).read_into(group, targets)
        for name, tensor in tensors.items():
            assert torch.equal(targets[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def test_different_values_do_not_become_one(root: Path) -> None:
    """Where the elements of an expanded tensor were saved with different values, it is refused."""
    CheckpointStore(root).save(30, Content({"model": {"x": torch.arange(3.0)}}), **ABOUT)
    target = torch.zeros(1).expand(3)
    with pytest.raises(CheckpointError, match="is expanded, so some of its elements are the same memory"):
        latest(root).read_into("model", {"x": target})
    assert target.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("__metadata__", "A tensor in model is named __metadata__, which safetensors keeps"),
        (0, "strings, but one .* 0"),
    ],
)
def test_names_that_cannot_be_stored_are_refused(root: Path, name: Any, message: str) -> None:
    """At the save, before anything is written."""
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(root).save(30, Content({"model": {name: torch.zeros(1)}}), **ABOUT)
    assert sorted(path.name for path in root.glob("*")) == [".lock", "latest", "step_0000010", "step_0000020"]


def test_nested_state_may_have_any_names(root: Path) -> None:
    """Also the one that safetensors keeps for itself."""
    state = {"__metadata__": torch.ones(2), "x": {"__metadata__": torch.zeros(1, dtype=torch.complex64)}}
    CheckpointStore(root).save(30, Content(global_state=state, rank_state=state["__metadata__"]), **ABOUT)
    got = latest(root).global_state()
    assert got["__metadata__"].tolist() == [1, 1]
    assert got["x"]["__metadata__"].tolist() == [0]


# ---------------------------------------------------------------------- a run goes on where somebody reads


def go_on(root: Path, *steps: int) -> None:
    """Save these steps, such that of all checkpoints the newest stays."""
    store = CheckpointStore(root, fs=Quick())
    for step in steps:
        store.save(step, small(step), **ABOUT)
    store.close()


@pytest.mark.parametrize(
    ("which", "step", "found"),
    [("latest", 30, 30), ("latest", 20, 20), ("link", 30, 30), ("link", 20, 20), (20, 30, None), (20, 20, None)],
)
@pytest.mark.parametrize("place", [(loading, "find_problems"), (loading, "read_texts")], ids=["files", "text"])
def test_one_that_is_removed_while_it_is_verified_is_not_called_damaged(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    which: Any,
    step: int,
    found: int | None,
    place: tuple[Any, str],
) -> None:
    """The run saves another step (30), or the same one again (20): `latest` and the link of that name lead to the new
    one; by its step it is told as removed.
    """
    once(*place, lambda: go_on(root, step), monkeypatch)
    which = root / "latest" if which == "link" else which
    if found is None and (step == 30 or place[1] == "find_problems"):
        with pytest.raises(CheckpointError, match="was removed or saved again while it was verified, by its run"):
            CheckpointStore(root).resolve(which)
    else:
        assert_holds(CheckpointStore(root).resolve(which), found or step)
    assert "amaged" not in caplog.text


@pytest.mark.parametrize("step", [20, 30])
@pytest.mark.parametrize("which", ["latest", "link", 20])
def test_one_that_is_removed_while_it_is_read_is_told_as_that(root: Path, which: Any, step: int) -> None:
    """Also where it was found by the link `latest`, which moves on: no two checkpoints are mixed."""
    checkpoint = CheckpointStore(root).resolve(root / "latest" if which == "link" else which)
    assert checkpoint is not None
    go_on(root, step)
    for read in (
        lambda: checkpoint.read_into("optim", {"m": torch.zeros(50)}),
        checkpoint.global_state,
        lambda: checkpoint.rank_state(0),
    ):
        with pytest.raises(CheckpointError, match="was removed or saved again while it was read, by its run"):
            read()


def test_the_link_of_a_run_at_work_never_leads_to_two(root: Path) -> None:
    """However often it moves: each read is of one checkpoint, or told as removed, and none is called damaged."""
    is_done = threading.Event()

    def work() -> None:
        store = CheckpointStore(root, fs=Quick())
        for step in range(30, 10_000):
            store.save(step, small(step), **ABOUT)
            if is_done.is_set():
                break
        store.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        num_read = 0
        while num_read < 40:
            with contextlib.suppress(RemovedError):
                checkpoint = CheckpointStore(root).resolve(root / "latest")
                assert checkpoint is not None
                assert_holds(checkpoint, checkpoint.manifest.step)
                num_read += 1
    finally:
        is_done.set()
        thread.join()


def test_the_docs_name_the_limits() -> None:
    """Each limit stands in docs/design.md with its number."""
    text = (REPOSITORY / "docs" / "design.md").read_text()
    for name in (
        "MAX_JSON_BYTES",
        "MAX_JSON_DEPTH",
        "MAX_HEADER_BYTES",
        "MAX_FILES",
        "MAX_TENSORS",
        "MAX_DIMS",
        "MAX_TEXT",
    ):
        assert f"| {getattr(limits, name):,}" in text, name
