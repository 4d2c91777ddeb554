"""What is exported from a checkpoint: every bit under every name, whole or not at all, in little memory."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from trainloop.checkpoint import Checkpoint, CheckpointStore, Content, FileSystem
from trainloop.checkpoint.format.catalog import read_manifest
from trainloop.checkpoint.format.tables import Chunk, FileRecord
from trainloop.checkpoint.format.tensorfile import serialize
from trainloop.checkpoint.load.reader import RemovedError
from trainloop.checkpoint.tools import export, pick, sources

from .folders import PREFIX, Quick, contents, flip, once, run, saved, steps_in
from .launching import environment
from .tampering import rewrite
from .workers.checkpoint_store import ABOUT, bits, files_of, folder_of, small


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.hidden = nn.Linear(6, 6, dtype=torch.bfloat16)
        self.out = nn.Linear(6, 13, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("num_seen", torch.tensor(2**40))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("mask", torch.tensor([[True], [False]]))


def test_a_file_has_all_names_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`load_file` and a strict `load_state_dict` take it, tied weights and buffers of every dtype included."""
    model = Tied()
    root = saved(tmp_path / "checkpoints", 1, content=lambda step: Content({"model": model.state_dict()}))
    out = tmp_path / "out.safetensors"
    assert run(capsys, "export", root, "--output", out)[0] == 0
    loaded = Tied()
    loaded.load_state_dict(load_file(out), strict=True)
    assert {n: bits(t) for n, t in loaded.state_dict().items()} == {n: bits(t) for n, t in model.state_dict().items()}
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "group": "model", "step": "1"}
    assert run(capsys, "export", root, "--output", out, "--force", "--dtype", "fp16")[0] == 0
    cast = {n: bits(t.half() if t.is_floating_point() else t) for n, t in model.state_dict().items()}
    assert {n: bits(t) for n, t in load_file(out).items()} == cast


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
def test_a_folder_is_a_model_for_from_pretrained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In one file or several: transformers finds every weight, ties what was tied, and each bit is the trained one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    model = tiny_model(kind)
    state = model.state_dict()
    config = model.config.to_json_string()
    store = CheckpointStore(tmp_path / "checkpoints", fs=Quick())
    store.save(1, Content({"model": state}), **ABOUT, extra={"model/config.json": config})
    store.close()
    for limit, num_files in (("1GB", 1), ("2KB", None)):
        out = tmp_path / limit
        code, _, told = run(capsys, "export", store.path, "--output", out, "--max-shard-size", limit)
        assert (code, told) == (0, "")
        files = sorted(out.glob("*.safetensors"))
        assert len(files) == num_files or len(files) > 3
        assert (out / "model.safetensors.index.json").exists() is (num_files is None)
        assert (out / "config.json").read_text() == config
        stored = load_file(folder_of(store.path, 1) / "model" / "model.safetensors")  # tied ones once
        assert sorted(name for file in files for name in load_file(file)) == sorted(stored) != sorted(state)
        loaded, info = type(model).from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert {n: bits(t) for n, t in loaded.state_dict().items()} == {n: bits(t) for n, t in state.items()}
        assert loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    out = tmp_path / "bf16"
    assert run(capsys, "export", store.path, "--output", out, "--dtype", "bf16")[0] == 0
    assert next(iter(transformers.AutoModel.from_pretrained(out).parameters())).dtype is torch.bfloat16


def tiny_model(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "dtype": "float32"}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, **small)
        return transformers.GPT2LMHeadModel(config)
    if kind == "t5":
        config = transformers.T5Config(
            d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **small
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **small
    )
    return transformers.BertForMaskedLM(config)


def test_a_value_that_the_dtype_cannot_hold_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finite weight never becomes infinite in silence; what was infinite before stays so, and nothing is left."""
    tensors = {"big": torch.tensor([1e5]), "infinite": torch.tensor([float("inf"), float("nan")])}
    root = saved(tmp_path / "checkpoints", 1, content=lambda step: Content({"model": tensors}))
    out = tmp_path / "out" / "out.safetensors"
    code, _, error = run(capsys, "export", root, "--output", out, "--dtype", "fp16")
    assert (code, error) == (
        1, f"{PREFIX}: error: big has values that float16 cannot hold: they would be inf.\n"
    )  # fmt: skip
    assert list(out.parent.iterdir()) == []
    assert run(capsys, "export", root, "--output", out, "--dtype", "bf16")[0] == 0
    assert load_file(out)["infinite"].isfinite().tolist() == [False, False]


def test_damage_of_what_is_read_is_refused_or_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By step it is an error that names the file; without one the newest healthy whole one is taken, and it is said.
    Damage of what is not read does no harm.
    """
    root = saved(tmp_path / "checkpoints", 10, 20, 30, health=lambda step: step != 30)
    out = tmp_path / "out.safetensors"

    def export(*arguments: Any) -> tuple[int, str]:
        code, _, error = run(capsys, "export", root, "--output", out, "--force", *arguments)
        return code, error

    def step() -> float:
        return load_file(out)["w0"][0].item()

    caplog.clear()
    assert export()[0] == 0
    assert step() == 20
    assert "step_0000030 are not all finite. Loading step_0000020, the newest healthy one." in caplog.text
    flip(folder_of(root, 20) / "optim" / "rank_00000.safetensors")
    assert export()[0] == 0
    assert step() == 20
    flip(folder_of(root, 20) / "model" / "model.safetensors")
    code, error = export("--step", 20)
    assert code == 1
    assert "step_0000020 is damaged: model/model.safetensors is damaged: its bytes" in error
    assert step() == 20, "what was there before stays"
    caplog.clear()
    assert export()[0] == 0
    assert step() == 10
    assert "step_0000020: model/model.safetensors is damaged" in caplog.text
    assert export("--group", "ema")[0] == 0
    assert step() == 10, "the average of step 20"
    for path in root.glob("step_*/model/*"):
        path.unlink()
    code, error = export()
    assert code == 1
    assert f"All checkpoints in {root} are damaged: step_0000020: model/model.safetensors is missing" in error


def test_nothing_of_value_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without `--force` nothing, and with it only what an export could have written; never a checkpoint."""
    root = saved(tmp_path / "checkpoints", 1)
    file, folder, work = tmp_path / "out.safetensors", tmp_path / "out", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    (work / "config.json").write_text("{}")
    for path in (file, folder):  # an empty folder may be filled
        assert run(capsys, "export", root, "--output", path)[0] == 0
        code, _, error = run(capsys, "export", root, "--output", path)
        assert (code, f"{path} exists. Give another path, or --force to replace it." in error) == (2, True)
    (folder / "model.safetensors").write_bytes(b"old")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    assert run(capsys, "export", root, "--output", folder, "--force")[0] == 0
    assert files_of(folder) == ["model.safetensors"]
    before = contents(tmp_path)
    for path, message in [
        (work, "holds what no export wrote: notes.txt."),
        (folder_of(root, 1) / "model", f"lies in a checkpoint, {folder_of(root, 1)}, which must not change."),
        (folder_of(root, 1) / "x.safetensors", "lies in a checkpoint"),
        (root / "step_0000009", "has the name of a checkpoint."),
        (tmp_path / "model.bin", "has a pickle's name."),
        (tmp_path, "holds what no export wrote: checkpoints, out, out.safetensors, work."),
    ]:
        code, _, error = run(capsys, "export", root, "--output", path, "--force")
        assert (code, message in error) == (2, True), error
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Space is looked for first, and a write that fails takes its temporary file or folder along."""
    root = saved(tmp_path / "checkpoints", 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").write_bytes(b"old")
    for path in (out / "old.safetensors", out / "folder"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileSystem, "sync_file", raise_no_space)
            code, _, error = run(capsys, "export", root, "--output", path, "--force")
        assert (code, "No space left on device" in error, "cannot be read" in error) == (1, True, False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileSystem, "free_bytes", lambda self, path: 1000)
            code, _, error = run(capsys, "export", root, "--output", path, "--force")
        assert code == 1
        assert f"It needs 1.0 MiB, but the disk of {out} has 0.0 MiB free" in error
        assert {name.name: name.read_bytes() for name in out.iterdir()} == {"old.safetensors": b"old"}


def raise_no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_more_parts_than_a_process_may_open(tmp_path: Path) -> None:
    """A checkpoint of 100 parts, of which every tensor has rows in each, is exported with 64 descriptors."""
    root = in_parts(saved(tmp_path / "checkpoints", 1, content=lambda step: Content({"model": ROWS})), 100)
    out = tmp_path / "out.safetensors"
    main = ["-m", "trainloop", "checkpoints", "export", str(root), "--output", str(out)]
    subprocess.run(
        ["/bin/sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable, *main], env=environment(), check=True
    )
    assert {name: bits(tensor) for name, tensor in load_file(out).items()} == {n: bits(t) for n, t in ROWS.items()}


def test_a_part_that_is_opened_again_is_of_the_same_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the run removes the checkpoint, or saves it again, the parts that are not open are an error that says so."""
    monkeypatch.setattr(sources.resource, "getrlimit", lambda _: (4, 4))
    root = in_parts(saved(tmp_path / "checkpoints", 1, content=lambda step: Content({"model": ROWS})), 3)
    again = in_parts(saved(tmp_path / "again", 1, content=lambda step: Content({"model": ROWS})), 3)
    for replace in (False, True):
        checkpoint = Checkpoint.open(folder_of(root, 1))
        opened = sources.Sources(checkpoint, checkpoint.records("model"))
        memory = memoryview(bytearray(8))
        for path in opened._files:  # two stay open, so the third takes turns with the second
            opened.read_into(path, "a", 0, memory)
        folder_of(root, 1).rename(tmp_path / f"moved {replace}")
        if replace:
            folder_of(again, 1).rename(folder_of(root, 1))
        first, second, third = opened._files
        for path in (first, third):
            opened.read_into(path, "a", 0, memory)
        with pytest.raises(RemovedError, match="was removed or saved again while it was read"):
            opened.read_into(second, "a", 0, memory)
        opened.close()
        if not replace:
            (tmp_path / "moved False").rename(folder_of(root, 1))


ROWS = {"a": torch.arange(200.0).reshape(100, 2), "b": torch.arange(300).reshape(100, 3)}


def in_parts(root: Path, num_parts: int) -> Path:
    """The checkpoint of step 1 with its rows dealt to so many files, as that many ranks of FSDP2 would have written."""
    folder = folder_of(root, 1)
    manifest = read_manifest(folder)
    (whole,) = {chunk.file for record in manifest.tensors["model"].values() for chunk in record.chunks}
    paths = [f"model/part-{i:05d}.safetensors" for i in range(num_parts)]
    pieces = {name: tensor.tensor_split(num_parts) for name, tensor in ROWS.items()}
    files = {path: record for path, record in manifest.files.items() if path != whole}
    for i, path in enumerate(paths):
        raw = b"".join(serialize({name: split[i].contiguous() for name, split in pieces.items()}))
        (folder / path).write_bytes(raw)
        files[path] = FileRecord(len(raw), zlib.crc32(raw))
    (folder / whole).unlink()
    records = {}
    for name, split in pieces.items():
        first = [0, *itertools.accumulate(len(piece) for piece in split)]
        chunks = [
            Chunk(path, name, (begin, 0), tuple(piece.shape))
            for path, begin, piece in zip(paths, first, split, strict=False)
        ]
        records[name] = dataclasses.replace(manifest.tensors["model"][name], chunks=tuple(chunks))
    rewrite(folder, files=files, tensors={**manifest.tensors, "model": records})
    return root


MEMORY = """
import sys
from pathlib import Path
from trainloop.__main__ import main

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

small, big, out, *more = sys.argv[1:]
assert main(["checkpoints", "export", small, "--output", f"{out}/small.safetensors", *more]) == 0
before = peak()
assert main(["checkpoints", "export", big, "--output", f"{out}/big.safetensors", *more]) == 0
print("grown by", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of a process's memory")
@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, big: Path, dtype: list[str]) -> None:
    """384 MiB, 256 of them in one tensor, are exported in a process that grows by less than 64 MiB."""
    root = saved(tmp_path / "small", 1)
    command = [sys.executable, "-c", MEMORY, str(root), str(big), str(tmp_path), *dtype]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    grown = int(done.stdout.split("grown by")[1])
    assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MiB"
    with safe_open(tmp_path / "big.safetensors", "pt") as file:
        rows = file.get_slice("big")
        assert [rows[i, 0].item() for i in (0, 1, 2**14 - 1, 2**16 - 1)] == [0, 1, 2**14 - 1, 2**16 - 1] or dtype


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 384 MiB."""
    rows = torch.arange(2.0**16)[:, None].expand(-1, 2**10).contiguous()
    tensors = {"big": rows, **{f"w{i}": torch.zeros(2**21) for i in range(16)}}
    return saved(tmp_path_factory.mktemp("big") / "checkpoints", 1, content=lambda step: Content({"model": tensors}))


def test_one_that_goes_makes_room_for_the_newer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the run removes the newest before it was verified, the one that took its place is exported."""
    root = saved(tmp_path / "checkpoints", 7)

    def go_on() -> None:
        store = CheckpointStore(root, fs=Quick())
        store.save(8, small(8), **ABOUT)
        store.close()

    once(pick, "look_into", go_on, monkeypatch)
    out = tmp_path / "out.safetensors"
    code, said, _ = run(capsys, "export", root, "--output", out)
    assert code == 0
    assert steps_in(root) == [8]
    assert f"step_0000008, model -> {out}" in said


@pytest.mark.parametrize("step", [7, 8])
def test_no_export_is_of_two_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """What the run saves again (7) or removes (by saving 8) between verification and reading is an error that says so,
    also where it was named by the link `latest`.
    """
    root = saved(tmp_path / "checkpoints", 7)

    def go_on() -> None:
        store = CheckpointStore(root, fs=Quick())
        store.save(step, small(step), **ABOUT)
        store.close()

    once(export, "look_for_space", go_on, monkeypatch)
    out = tmp_path / "out.safetensors"
    code, _, error = run(capsys, "export", root / "latest", "--output", out)
    assert code == 1
    assert error == (
        f"{PREFIX}: error: {folder_of(root, 7)} was removed or saved again while it was read, by its run. Try again.\n"
    )
    assert not out.exists()
