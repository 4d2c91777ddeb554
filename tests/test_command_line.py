"""The command line on real folders: what it says is so, it writes nothing unasked, and removes no good one."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainloop.checkpoint import (
    BestK,
    CheckpointStore,
    EverySeconds,
    KeepInterval,
    KeepPrevious,
    KeepSteps,
    ManifestInfo,
    RetentionPolicy,
)
from trainloop.checkpoint.disk import lock
from trainloop.checkpoint.disk.lock import FolderLock
from trainloop.checkpoint.format import layout
from trainloop.checkpoint.format.layout import manifest_texts, parse_manifest
from trainloop.checkpoint.retention import describe_policies, read_policies, to_delete
from trainloop.checkpoint.tools import survey

from .folders import PREFIX, Quick, contents, flip, once, run, saved, steps_in, truncate
from .launching import REPOSITORY, environment, launch
from .tampering import rewrite
from .workers.checkpoint_store import ABOUT, bits, files_of, folder_of, small

WORKER = REPOSITORY / "tests" / "workers" / "command_line.py"


# ---------------------------------------------------------------------- a run's own checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a run under FSDP2 on two ranks, with all that they held at its end in files beside."""
    workspace = tmp_path_factory.mktemp("trained")
    launch(WORKER, "fsdp2", str(workspace))
    return workspace


@pytest.mark.parametrize("group", ["model", "ema", "optim"])
def test_what_a_sharded_run_ended_with_is_exported_bit_by_bit(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], group: str
) -> None:
    """Weights, their average and the optimizer's state, each rank with a part: the file holds the whole tensors."""
    folder = folder_of(trained / "checkpoints", 5)
    assert len(list((folder / group).glob("*.safetensors"))) == 2
    out = tmp_path / "new" / "out.safetensors"
    code, said, _ = run(capsys, "export", trained / "checkpoints", "--group", group, "--output", out)
    assert code == 0
    assert f"step_0000005, {group} -> {out}" in said
    expected, got = load_file(trained / f"{group}.safetensors"), load_file(out)
    assert {name: bits(tensor) for name, tensor in got.items()} == {n: bits(t) for n, t in expected.items()}


def test_the_table_says_what_the_run_keeps(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hook's policies are in the manifest, so `ls` tells why each checkpoint stays. No checkpoint has the metric of
    `BestK` yet, so it keeps all.
    """
    code, said, _ = run(capsys, "ls", trained / "checkpoints")
    assert code == 0
    lines = [re.sub(r"\d+ s|[\d.]+ KiB", "", line).split() for line in said.splitlines()]
    best = ["BestK(metric='val/loss',", "k=2,", "mode='min')"]
    assert lines == [
        ["step", "age", "size", "health", "kept", "by"],
        ["2", "healthy", *best],
        ["4", "healthy", "KeepPrevious(num=1),", *best],
        ["5", "healthy", "newest,", "newest", "healthy,", "KeepPrevious(num=1),", *best],
    ]
    code, said, _ = run(capsys, "ls", trained / "checkpoints", "--json")
    assert json.loads(said)["retention"] == [
        {"policy": "KeepPrevious", "num": 1},
        {"policy": "BestK", "metric": "val/loss", "k": 2, "mode": "min"},
    ]


def test_it_runs_as_a_module_of_its_own(trained: Path, tmp_path: Path) -> None:
    """From another folder, without a process group; errors are one line on stderr, also where nobody reads the rest."""
    python = [sys.executable, "-m", "trainloop", "checkpoints"]
    kwargs: dict[str, Any] = {"cwd": tmp_path, "env": environment(RANK="1", WORLD_SIZE="2"), "text": True}
    done = subprocess.run([*python, "verify", str(trained / "checkpoints")], capture_output=True, **kwargs)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"(step_000000[245]: ok, healthy \([\d.]+ KiB\)\n){3}", done.stdout)
    done = subprocess.run([*python, "export", str(trained)], capture_output=True, **kwargs)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"{PREFIX}: error: \S+ holds no checkpoints of trainloop: it .* There are checkpoints in \S+/checkpoints\.\n",
        done.stderr,
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*python, "ls", str(trained / "checkpoints")], stdout=write, stderr=subprocess.PIPE, **kwargs)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


# ---------------------------------------------------------------------- ls


def test_the_table_shows_metrics_health_damage_and_leftovers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row a checkpoint in the order of commits, why it stays, and below what is wrong and what else lies there."""
    root = saved(
        tmp_path / "checkpoints", 10, 40, 20, 30, 25,
        metrics=lambda step: {"val": {"loss": 100 / step}, "train": {"loss": 1.0}},
        health=lambda step: step != 25,
        retention=[BestK("val/loss", 1)],
    )  # fmt: skip
    cut = folder_of(root, 40) / "optim" / "rank_00000.safetensors"
    num_bytes = cut.stat().st_size
    truncate(cut)
    (folder_of(root, 10) / "manifest.json").unlink()
    (root / ".tmp-step_0000050-x").mkdir()
    (root / ".tmp-step_0000050-x" / "file").write_bytes(b"x" * 2048)
    code, said, _ = run(capsys, "ls", root)
    assert code == 0
    lines = said.splitlines()
    assert lines[0].split() == ["step", "age", "size", "health", "val/loss", "kept", "by"]
    rows = [[cell.strip() for cell in re.split(r"  +", line.strip())] for line in lines[1:6]]
    keep_steps = "KeepSteps([10, 20, 25, 30, 40])"
    assert [(row[0], row[3], row[4], row[5]) for row in rows] == [
        ("10", "unreadable", "-", "-"),
        ("40", "damaged", "2.5", "-"),
        ("20", "healthy", "5", keep_steps),
        ("30", "healthy", "3.333", f"newest healthy, BestK(metric='val/loss', k=1, mode='min'), {keep_steps}"),
        ("25", "non-finite", "4", f"newest, {keep_steps}"),
    ]
    assert lines[6:8] == [
        "step_0000010 is unreadable: manifest.json is missing",
        f"step_0000040 is damaged: optim/rank_00000.safetensors has {num_bytes - 1} bytes instead of {num_bytes}",
    ]
    assert re.fullmatch(
        r"\.tmp-step_0000050-x is a save under way, or one that died \(2\.0 KiB, written \d s ago\)", lines[8]
    )
    assert run(capsys, "ls", root, "--metric", "train/loss", "--metric", "x")[1].splitlines()[0].split() == [
        "step", "age", "size", "health", "train/loss", "x", "kept", "by",
    ]  # fmt: skip


def test_json_is_strict_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs get every field, and numbers that JSON has not as strings."""
    root = saved(tmp_path / "checkpoints", 1, metrics={"a": float("nan"), "b": float("-inf"), "train": {"c": 1.5}})
    code, said, _ = run(capsys, "ls", root, "--json")
    listed = json.loads(said, parse_constant=pytest.fail)
    (entry,) = listed["checkpoints"]
    assert code == 0
    assert entry["metrics"] == {"a": "nan", "b": "-inf", "train/c": 1.5}
    assert (entry["step"], entry["health"], entry["problems"]) == (1, "healthy", [])
    assert entry["kept_by"] == ["newest", "newest healthy", "KeepInterval(interval=1)", "KeepSteps([1])"]
    assert entry["num_bytes"] == sum(
        (folder_of(root, 1) / path).stat().st_size for path in files_of(folder_of(root, 1))
    )
    assert abs(entry["time"] - time.time()) < 60
    assert listed["leftovers"] == []


class KeepMondays:
    def keep(self, manifests: Sequence[ManifestInfo]) -> set[int]:
        return {manifest.step for manifest in manifests}


def test_a_policy_of_the_users_own_is_named_and_never_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It can only be asked in the run: `ls` says so, and `prune` does not go on without it."""
    root = saved(tmp_path / "checkpoints", 1, 2, retention=[KeepMondays()])
    assert "What KeepMondays keeps can only be asked in the run itself." in run(capsys, "ls", root)[1]
    before = contents(root)
    code, _, error = run(capsys, "prune", root)
    assert code == 1
    assert error == (
        f"{PREFIX}: error: The run keeps what KeepMondays wants, which can only be asked in the run itself. Give"
        " policies.\n"
    )
    assert contents(root) == before


def test_a_manifest_without_policies_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The field is younger than the format: where it is missing, `ls` works and `prune` asks for policies."""
    root = saved(tmp_path / "checkpoints", 1)
    path = folder_of(root, 1) / "manifest.json"
    body = re.sub(r'\n "retention": .*', "", path.read_text())
    path.write_text(layout._sealed(body[: body.rfind('"crc32": ')]))
    assert run(capsys, "ls", root)[0] == 0
    code, _, error = run(capsys, "prune", root)
    assert (code, "does not say what its run keeps. Give policies" in error) == (1, True)
    assert run(capsys, "prune", root, "--keep-previous", 0)[0] == 0


# ---------------------------------------------------------------------- verify


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_every_bad_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    """Each file of a checkpoint in turn, then all of them: exit code 1, its name, and the sound one is ok."""
    root = saved(tmp_path / "checkpoints", 10, 20)
    shutil.copytree(root, tmp_path / "whole", symlinks=True)
    paths = files_of(folder_of(root, 20))
    for bad in [*([path] for path in paths), [path for path in paths if "/" in path]]:
        for path in bad:
            damage(folder_of(root, 20) / path)
        code, said, _ = run(capsys, "verify", root)
        told = {line.partition(": ")[0]: line for line in said.splitlines()}
        assert code == 1
        assert told["step_0000010"].startswith("step_0000010: ok, healthy (")
        assert all(f" {path} " in told["step_0000020"] for path in bad)
        assert [path for path in paths if path not in bad and f" {path} " in told["step_0000020"]] == []
        assert run(capsys, "verify", root, "--step", 10)[0] == 0
        assert run(capsys, "verify", root, "--step", 10, 20)[0] == 1
        assert run(capsys, "verify", folder_of(root, 20))[0] == 1
        assert run(capsys, "verify", folder_of(root, 10))[0] == 0
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "whole", root, symlinks=True)


# ---------------------------------------------------------------------- beside a run


def test_reading_commands_write_nothing_and_need_no_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a run holding the folder, and on one that cannot be written: `ls`, `verify`, `export` and the dry run of
    `prune` leave every file and folder as it was.
    """
    root = saved(tmp_path / "checkpoints", 10, 20, 30)
    (root / ".trash-step_0000005-x").mkdir()
    folders = [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]
    holder = FolderLock(root)
    for folder in folders:
        folder.chmod(0o555)
    before = contents(root)
    for number, command in enumerate(
        (
            ["ls", root],
            ["ls", root, "--json"],
            ["verify", root],
            ["export", root, "--output", tmp_path / "out.safetensors"],
            ["export", folder_of(root, 10), "--output", tmp_path / "out"],
            ["prune", root, "--keep-previous", 0],
        )
    ):
        assert run(capsys, *command)[0] == 0, number
    assert contents(root) == before
    for folder in folders:
        folder.chmod(0o755)
    holder.release()


def save_on_and_on(root: Path) -> None:
    """Save the same few steps again and again, and let go of the ones before."""
    store = CheckpointStore(root, fs=Quick())
    for number in range(10**9):
        store.save(number % 3, small(number), **ABOUT, retention=[KeepPrevious(number % 2)])


def test_a_run_that_saves_and_removes_is_never_taken_for_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """While every checkpoint is replaced or removed many times a second, `ls` and `verify` name no damage, and what
    `export` writes is of one checkpoint.
    """
    root = saved(tmp_path / "checkpoints", 0)
    process = multiprocessing.get_context("fork").Process(target=save_on_and_on, args=(root,))
    process.start()
    num_exported, num_read, end = 0, 0, time.monotonic() + 100
    try:
        while num_read < 60 or num_exported < 5:
            assert time.monotonic() < end, (num_read, num_exported)
            code, said, _ = run(capsys, "ls", root)
            assert (code, "damaged" in said, "unreadable" in said) == (0, False, False), said
            num_read += 1
            code, said, error = run(capsys, "verify", root)
            assert (code, "damaged" in said) == (0, False) or "has no checkpoints" in error, (said, error)
            code, _, error = run(capsys, "export", root, "--output", tmp_path / "out.safetensors", "--force")
            if code == 0:
                assert (
                    len({value for t in load_file(tmp_path / "out.safetensors").values() for value in t.tolist()}) == 1
                )
                num_exported += 1
            else:
                assert re.search("while it was read|faster than|has no checkpoint", error), error
    finally:
        process.kill()
        process.join()
    assert "damaged" not in caplog.text.lower()


def test_what_changes_between_manifest_and_files_is_looked_at_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is saved again after its manifest was read is no damage: the new one is verified."""
    root = saved(tmp_path / "checkpoints", 7)
    again = small(7)
    again.weights["model"]["w0"] += 1  # type: ignore[index]
    once(survey, "find_problems", lambda: saved(root, 7, content=again), monkeypatch)  # type: ignore[arg-type]
    code, said, _ = run(capsys, "verify", root)
    assert code == 0
    assert re.fullmatch(r"step_0000007: ok, healthy \(.*\)\n", said)


# ---------------------------------------------------------------------- prune


def test_nothing_is_removed_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run tells what would stay and why, what would go and what that frees; `--yes` does that and no more."""
    root = saved(
        tmp_path / "checkpoints", 10, 20, 30, 40, 50,
        metrics=lambda step: {"val": {"loss": abs(step - 21), "accuracy": step}}, health=lambda step: step < 40,
    )  # fmt: skip
    (root / ".trash-step_0000005-x").mkdir()
    (root / ".trash-step_0000005-x" / "file").write_bytes(b"x" * 1024)
    before = contents(root)
    arguments = ["--best", "val/loss:1", "--best", "val/accuracy:1:max", "--keep-previous", 0]
    code, said, _ = run(capsys, "prune", root, *arguments)
    assert code == 0
    assert contents(root) == before
    table = [re.split(r"  +", line) for line in said.splitlines()[:-2]]
    best = "BestK(metric='val/loss', k=1, mode='min')"
    most = "BestK(metric='val/accuracy', k=1, mode='max')"
    assert [(row[0], row[1], row[3]) for row in table] == [
        ("stays", "step_0000020", best),
        ("stays", "step_0000030", "newest healthy"),
        (
            "stays",
            "step_0000050",
            f"newest, {best.replace('val/loss', 'val/accuracy').replace('min', 'max')}, KeepPrevious(num=0)",
        ),
        ("goes", "step_0000010", "no policy wants it"),
        ("goes", "step_0000040", "no policy wants it"),
        ("goes", ".trash-step_0000005-x", "a checkpoint being removed, or left by a removal that died"),
    ]
    freed = sum(len(b or b"") for path, (_, b) in before.items() if re.search("step_00000[14]0|trash", path))
    policies = f"{best}, {most}, KeepPrevious(num=0)"
    assert said.splitlines()[-2:] == [
        f"By the policies given: {policies}; always the newest and the newest healthy stay.",
        f"Would remove 3 ({freed / 1024:.1f} KiB). Nothing was removed: --yes does it.",
    ]
    code, said, _ = run(capsys, "prune", root, *arguments, "--yes")
    assert (code, said.splitlines()[-1]) == (0, f"Removed 3 ({freed / 1024:.1f} KiB).")
    assert sorted(path.name for path in root.iterdir() if path.name != ".lock") == [
        "latest", "step_0000020", "step_0000030", "step_0000050",
    ]  # fmt: skip


def test_without_a_policy_the_runs_own_are_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the newest manifest names, not those of an earlier life of the run."""
    root = saved(tmp_path / "checkpoints", 10, 20, 30, 40)
    store = CheckpointStore(root, fs=Quick())
    store.save(50, small(50), **ABOUT, retention=[KeepInterval(20), *[KeepSteps([10, 30])]])
    store.close()
    assert steps_in(root) == [10, 20, 30, 40, 50]
    rewrite(folder_of(root, 50), retention=describe_policies([KeepInterval(20)]))
    assert run(capsys, "prune", root, "--yes")[0] == 0
    assert steps_in(root) == [20, 40, 50]
    said = run(capsys, "prune", root, "--keep-steps", "40,7", "--every-seconds", 1e6)[1]
    assert [line.split(maxsplit=4)[4] for line in said.splitlines()[:3]] == [
        "EverySeconds(seconds=1000000.0)", "KeepSteps([7, 40])", "newest, newest healthy",
    ]  # fmt: skip


def test_a_damaged_one_takes_no_sound_ones_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in the newest is found before anything is removed: the one before it is then the newest, and the
    damaged stay unless `--damaged` is given.
    """
    root = saved(tmp_path / "checkpoints", 10, 20, 30, 40)
    flip(folder_of(root, 40) / "model" / "model.safetensors")
    (folder_of(root, 10) / "manifest.json").unlink()
    code, said, _ = run(capsys, "prune", root, "--keep-previous", 0, "--yes")
    assert code == 0
    assert steps_in(root) == [10, 30, 40]
    assert re.search(r"stays  step_0000040 .* damaged: model/model.safetensors is damaged: its bytes", said)
    assert re.search(r"stays  step_0000010 .* unreadable: manifest.json is missing", said)
    assert run(capsys, "prune", root, "--keep-previous", 0, "--yes", "--damaged")[0] == 0
    assert steps_in(root) == [30]
    assert os.readlink(root / "latest") == "step_0000030"
    flip(folder_of(root, 30) / "model" / "model.safetensors")
    for damaged in ([], ["--damaged"]):
        code, _, error = run(capsys, "prune", root, "--keep-previous", 0, "--yes", *damaged)
        assert (code, "is whole, so none is removed: step_0000030: model/model.safetensors" in error) == (1, True)
    assert steps_in(root) == [30]
    flip(folder_of(root, 30) / "model" / "model.safetensors")
    assert run(capsys, "prune", root, "--keep-previous", 0, "--yes", "--damaged")[0] == 0


def test_a_run_that_holds_the_folder_is_not_disturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prune --yes` says which process has it, and removes nothing."""
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.1)
    root = saved(tmp_path / "checkpoints", 10, 20)
    store = CheckpointStore(root)
    store.open()
    before = contents(root)
    code, _, error = run(capsys, "prune", root, "--keep-previous", 0, "--yes")
    assert code == 1
    assert f"{root} is in use by another run (process {os.getpid()} on " in error
    assert contents(root) == before
    store.close()
    assert run(capsys, "prune", root, "--keep-previous", 0, "--yes")[0] == 0
    assert steps_in(root) == [20]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    commits=st.lists(
        st.tuples(st.integers(0, 8), st.booleans(), st.sampled_from(["", "flip", "truncate"])), min_size=1
    ),
    keep=st.tuples(st.none() | st.integers(0, 2), st.none() | st.integers(1, 4), st.none() | st.integers(1, 2)),
    with_damaged=st.booleans(),
)
def test_the_newest_and_the_newest_healthy_never_go(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    commits: list[tuple[int, bool, str]],
    keep: tuple[int | None, int | None, int | None],
    with_damaged: bool,
) -> None:
    """Whatever was committed, is damaged and is asked for: what goes is exactly what retention lets go of among the
    whole ones, and the newest whole and newest healthy are there; damaged ones go only if it was said.
    """
    root = tmp_path_factory.mktemp("history") / "checkpoints"
    store = CheckpointStore(root, fs=Quick())
    for step, health, _ in commits:
        store.save(step, small(step, health), run_id="run", metrics={"m": step}, retention=[KeepInterval(1)])
    store.close()
    infos = {info.step: info for info in store.checkpoints()}
    damage = {step: how for step, _, how in commits}
    for step, how in damage.items():
        if how:
            (flip if how == "flip" else truncate)(folder_of(root, step) / "model" / "model.safetensors")
    whole = [info for info in infos.values() if not damage[info.step]]
    previous, interval, best = keep
    options = {"--keep-previous": previous, "--keep-interval": interval, "--best": best and f"m:{best}"}
    given_options = [part for name, value in options.items() if value is not None for part in (name, value)]
    policies: list[RetentionPolicy] = [KeepInterval(1)] if not given_options else []
    policies += [KeepPrevious(previous)] if previous is not None else []
    policies += [KeepInterval(interval)] if interval is not None else []
    policies += [BestK("m", best)] if best is not None else []
    expected = set(infos) - set(to_delete(whole, policies))
    if not whole:
        expected = set(infos)
    elif with_damaged:
        # One that would go is not read, so a flipped bit in it is not seen; it goes all the same.
        expected -= {step for step, how in damage.items() if how}
    code, _, error = run(capsys, "prune", root, *given_options, "--yes", *["--damaged"] * with_damaged)
    assert code == (0 if whole else 1), error
    left = set(steps_in(root))
    assert {info.step for info in whole[-1:]} <= left
    assert {info.step for info in [info for info in whole if info.health][-1:]} <= left
    unread = {step for step, how in damage.items() if how == "flip"}
    assert left - unread == expected - unread
    shutil.rmtree(root.parent)


# ---------------------------------------------------------------------- what users get wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["ls"], "the following arguments are required: DIR"),
        (["list", "X"], "invalid choice: 'list'"),
        (["ls", "nowhere"], "nowhere holds no checkpoints of trainloop: it does not exist."),
        (
            ["ls", "foreign"],
            "foreign holds no checkpoints of trainloop: it looks like an `accelerator.save_state` folder",
        ),
        (["ls", "checkpoints/step_0000001"], "checkpoints/step_0000001 is a checkpoint itself. Give the folder"),
        (["verify", "checkpoints", "--step", "x"], "argument --step: invalid int value: 'x'"),
        (["export", "checkpoints", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["export", "checkpoints", "--max-shard-size", "5 apples"], "a size must be like 5GB, 500MB or 2GiB, but is"),
        (["export", "checkpoints", "--max-shard-size", "0"], "a size must be like 5GB, 500MB or 2GiB, but is '0'"),
        (["prune", "checkpoints", "--keep-steps", "1,x"], "steps must be numbers with commas between, but are '1,x'"),
        (
            ["prune", "checkpoints", "--best", "a:1:least"],
            "must be METRIC, METRIC:K, METRIC:K:min or METRIC:K:max, but",
        ),
        (["prune", "checkpoints", "--best", "a:0"], "`k` must be at least 1, but is 0."),
        (["prune", "checkpoints", "--best", "los"], "No checkpoint has the metric 'los', only: loss."),
        (["prune", "checkpoints", "--keep-previous", "-1"], "`num` must be at least 0, but is -1."),
        (["prune", "checkpoints", "--y"], "unrecognized arguments: --y"),
        (["prune", "checkpoints", "--every-seconds", "0"], "`seconds` must be greater than 0, but is 0.0."),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    """Exit code 2, and stderr says what is wrong."""
    saved(tmp_path / "checkpoints", 1, metrics={"loss": 1.0})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "random_states_0.pkl").touch()
    monkeypatch.chdir(tmp_path)
    code, said, error = run(capsys, *arguments)
    assert (code, said) == (2, "")
    assert re.fullmatch(rf"{PREFIX}[a-z ]*: error: .*\n", error)
    assert message in error


def test_what_is_not_there_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step, a group, or anything at all: exit code 1, and what there is instead. An empty folder may be listed."""
    root = saved(tmp_path / "checkpoints", 1)
    for arguments, message in [
        (["verify", root, "--step", 2], f"{root} has no checkpoint of step 2, only of: 1."),
        (["export", root, "--step", 2], f"{root} has no checkpoint of step 2, only of: 1."),
        (["export", root, "--group", "emma"], 'has no tensors in a group "emma"; its groups: model, ema, optim.'),
        (["verify", tmp_path / "empty"], f"{tmp_path / 'empty'} has no checkpoints."),
        (["export", tmp_path / "empty"], f"{tmp_path / 'empty'} has no checkpoint."),
    ]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        code, _, error = run(capsys, *arguments)
        assert (code, error.endswith(f"{message}\n"), error.count("\n")) == (1, True, 1), error
    for command in ("ls", "prune"):
        assert run(capsys, command, tmp_path / "empty") == (0, f"{tmp_path / 'empty'} has no checkpoints yet.\n", "")


def test_a_newer_format_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a later trainloop wrote is told as such by each command, and nothing is removed beside it."""
    root = saved(tmp_path / "checkpoints", 1, 2)
    path = folder_of(root, 2) / "manifest.json"
    body = path.read_text().replace(f'"version": {layout.VERSION}', f'"version": {layout.VERSION + 1}')
    path.write_text(layout._sealed(body[: body.rfind('"crc32": ')]))
    for command in (
        ["ls", root],
        ["verify", root],
        ["verify", path.parent],
        ["export", root],
        ["export", path.parent],
        ["prune", root, "--keep-previous", 0, "--yes"],
    ):
        code, said, error = run(capsys, *command)
        assert (code, said) == (1, "")
        assert error.startswith(f"{PREFIX}: error: {path.parent}: ")
        assert "Update trainloop" in error
    assert steps_in(root) == [1, 2]


# ---------------------------------------------------------------------- the policies in a manifest


@given(
    st.lists(
        st.one_of(
            st.builds(KeepPrevious, st.integers(0, 4)),
            st.builds(KeepInterval, st.integers(1, 6)),
            st.builds(KeepSteps, st.lists(st.integers(0, 30), max_size=4)),
            st.builds(BestK, st.text(), st.integers(1, 3), mode=st.sampled_from(["min", "max"])),
            st.builds(EverySeconds, st.floats(min_value=0, exclude_min=True)),
        )
    )
)
def test_policies_survive_a_manifest(policies: list[RetentionPolicy]) -> None:
    """Every policy of ours comes back as it was; anything else as its name, a subclass of ours included."""

    class Special(KeepPrevious):
        pass

    info = ManifestInfo(1, 1, "run", 0.0, 1, True, {}, 0)
    from trainloop.checkpoint import Manifest

    described = describe_policies([*policies, KeepMondays(), Special(1)])
    manifest = Manifest(**vars(info) | {"retention": described}, versions={}, files={}, tensors={})
    got = parse_manifest(*manifest_texts(manifest)).retention
    assert got is not None
    special = "test_policies_survive_a_manifest.<locals>.Special"
    assert read_policies(got) == (policies, ["KeepMondays", special])
    later = [{"policy": "KeepPrevious", "num": 1, "of": "a later version"}, {"policy": "KeepBest"}]
    assert read_policies(later) == ([], ["KeepPrevious", "KeepBest"])
