"""Exports the adapters of a checkpoint for `PeftModel.from_pretrained`, or merges one into its base model."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ..disk.fs import FileSystem
from ..fingerprint import fingerprints
from ..format.dtypes import DTYPES
from ..format.files import read_regular
from ..format.layout import PEFT, Manifest
from ..format.limits import MAX_JSON_BYTES
from ..format.nested import parse_json
from ..format.tables import FileRecord, TensorRecord
from ..load.reader import Checkpoint
from .export import Exported, check_output, look_for_space, needed_files, put_in_place, write_tensors
from .sources import Sources

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def peft_files(manifest: Manifest, group: str) -> dict[str, FileRecord]:
    """The files that the exports in this module read."""
    files = {path: record for path, record in manifest.files.items() if path == PEFT}
    return {**needed_files(manifest, group), **files}


def export_peft(
    checkpoint: Checkpoint,
    group: str,
    output: Path,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    fs: FileSystem | None = None,
) -> tuple[Exported, list[str]]:
    """Write an adapter as a folder with `adapter_config.json` and `adapter_model.safetensors`. Needs no peft.

    Args:
        checkpoint: The checkpoint. Its `peft_files` must have been verified.
        group: "model", or an average of the model.
        output: A folder. Missing parent folders are made.
        adapter: Name of the adapter. None: "default", or the only one.
        dtype: Cast floats of 16 bits or more to this dtype. None: keep their dtypes.
        force: Replace an existing output, if an export could have written it.
        fs: The disk.

    Returns:
        The result, and the names of trained parameters that belong to no adapter.

    Raises:
        ValueError: `output` cannot be written to, or there is no such adapter.
        CheckpointError: The checkpoint has no peft adapters, or the disk has no space.
    """
    fs = fs if fs is not None else FileSystem()
    output = _folder(output, force)
    described = _read_adapters(checkpoint)
    chosen = _choose(described, adapter)
    records = _records(checkpoint, group, chosen["tensors"])
    temporary = output.with_name(f".{output.name}.tmp-{secrets.token_hex(4)}")
    fs.make_dir(output.parent)
    try:
        num_bytes = _write(fs, checkpoint, temporary, chosen["config"], records, dtype)
        put_in_place(fs, temporary, output)
    except BaseException:
        if os.path.lexists(temporary):
            fs.remove_tree(temporary)
        raise
    return Exported(output, len(records), 1, num_bytes), list(described["others"])


def export_merged(
    checkpoint: Checkpoint,
    group: str,
    output: Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
) -> Path:
    """Merge an adapter into a transformers model, and write the model for `from_pretrained`. Needs peft, transformers
    and memory for the whole model.

    The base model is `base`, or the one that the adapter's configuration names. The checkpoint's weights overwrite it.
    Weights that the checkpoint leaves out must be the same as in the run.

    Args:
        checkpoint: The checkpoint. Its `peft_files` must have been verified.
        group: "model", or an average of the model.
        output: A folder. Missing parent folders are made.
        base: The base model, in a form that `from_pretrained` accepts. Not needed if the checkpoint has all weights.
        adapter: Name of the adapter. None: "default", or the only one.
        dtype: Dtype of the written model. None: that of the weights.
        max_shard_bytes: Limit of tensor bytes per file.
        force: Replace an existing output, if an export could have written it.

    Raises:
        ValueError: An argument is wrong, or the base model is neither given nor known.
        CheckpointError: The base model differs from that of the run, or the adapter cannot be merged.
    """
    output = _folder(output, force)
    try:
        import peft
        import transformers
    except ImportError as ex:
        raise CheckpointError(
            f"--merge needs {ex.name}. Install it with `pip install 'trainloop-accelerate[peft]'`"
        ) from ex
    described = _read_adapters(checkpoint)
    chosen, config = _choose(described, adapter), described["base"] or {}
    source = base or chosen["config"].get("base_model_name_or_path")
    kind = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if kind is None:
        raise CheckpointError(
            f"{checkpoint.folder} does not say which class of transformers the base model has. Merge in Python, with"
            " peft's `merge_and_unload`"
        )
    frozen = checkpoint.manifest.frozen
    if source is None and frozen:
        raise ValueError(
            f"{checkpoint.folder} leaves out the frozen weights, so --merge needs --base, the folder or the name that"
            " `from_pretrained` takes"
        )
    if source is not None:
        dtypes = {record.dtype for record in frozen.values()}
        own = {"dtype": DTYPES[dtypes.pop()]} if len(dtypes) == 1 else {}
        model = kind.from_pretrained(source, **own)
    else:
        model = kind(kind.config_class.from_dict(config))
    with tempfile.TemporaryDirectory() as folder:
        records = _records(checkpoint, group, chosen["tensors"])
        _write(FileSystem(), checkpoint, Path(folder, "adapter"), chosen["config"], records, None)
        whole = peft.PeftModel.from_pretrained(model, Path(folder, "adapter"), autocast_adapter_dtype=False)
    _fill(checkpoint, group, whole, adapter_of(described, adapter))
    try:
        merged = whole.merge_and_unload(safe_merge=True)
    except Exception as ex:
        raise CheckpointError(f"peft cannot merge this adapter: {ex}") from ex
    merged = merged if dtype is None else merged.to(dtype)
    fs, temporary = FileSystem(), output.with_name(f".{output.name}.tmp-{secrets.token_hex(4)}")
    fs.make_dir(output.parent)
    look_for_space(fs, output.parent, sum(t.nbytes for t in merged.state_dict().values()))
    try:
        merged.save_pretrained(temporary, max_shard_size=max_shard_bytes)
        put_in_place(fs, temporary, output)
    except BaseException:
        if os.path.lexists(temporary):
            fs.remove_tree(temporary)
        raise
    return output


def adapter_of(described: Mapping[str, Any], asked: str | None) -> str:
    """The name of the requested adapter.

    Raises:
        ValueError: There is no such adapter, or the request is ambiguous.
    """
    names = list(described["adapters"])
    name = asked if asked is not None else "default" if "default" in names or len(names) != 1 else names[0]
    if name not in names:
        raise ValueError(f"--adapter must be one of {', '.join(names)}, but is {name}")
    return str(name)


def _choose(described: Mapping[str, Any], asked: str | None) -> dict[str, Any]:
    chosen: dict[str, Any] = described["adapters"][adapter_of(described, asked)]
    return chosen


def _folder(output: Path, force: bool) -> Path:
    if output.suffix == ".safetensors":
        raise ValueError(f"{output} has a file's name, but `from_pretrained` reads a folder. Give another path")
    check_output(output, force)
    return Path(os.path.abspath(output))


def _read_adapters(checkpoint: Checkpoint) -> dict[str, Any]:
    if PEFT not in checkpoint.manifest.files:
        raise CheckpointError(
            f"{checkpoint.folder} has no adapters of peft (no {PEFT}): the model was none of `peft.get_peft_model`, or"
            " was saved by an earlier trainloop"
        )
    described = parse_json(read_regular(checkpoint.folder, PEFT, MAX_JSON_BYTES).decode())
    if "error" in described:
        raise CheckpointError(
            f"{checkpoint.folder}: peft could not tell the adapters at the save: {described['error']}"
        )
    return dict(described)


def _records(checkpoint: Checkpoint, group: str, names: Mapping[str, str]) -> dict[str, TensorRecord]:
    """The records of an adapter, by peft's names."""
    own = checkpoint.records(group)
    if missing := [name for name in names.values() if name not in own]:
        raise CheckpointError(
            f"{checkpoint.folder}, {group} leaves out {len(missing)} tensors of the adapter, which were frozen and as"
            f" `build_model` gave them (first: {missing[0]}). Save without `trainable_only`"
        )
    return {key: own[name] for key, name in names.items()}


def _write(
    fs: FileSystem,
    checkpoint: Checkpoint,
    folder: Path,
    config: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
    dtype: torch.dtype | None,
) -> int:
    """Write the folder of an adapter. Returns the bytes of tensors."""
    fs.make_dir(folder)
    with closing(Sources(checkpoint, records)) as sources:
        num_bytes = write_tensors(fs, folder / ADAPTER, records, sources, dtype, {"format": "pt"})
    fs.write(folder / ADAPTER_CONFIG, [json.dumps(config, indent=2, sort_keys=True).encode()])
    fs.sync_dir(folder)
    return num_bytes


@torch.no_grad()
def _fill(checkpoint: Checkpoint, group: str, whole: Any, adapter: str) -> None:
    """Copy the checkpoint's weights into a model, whose adapter is named "default", and check the weights left out."""
    state = {_own_name(name, adapter): tensor for name, tensor in whole.state_dict().items()}
    saved = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(group).items()}
    checkpoint.read_into(group, saved)
    for name in saved.keys() & state.keys():
        state[name].copy_(saved[name])
    left_out = {name: record for name, record in checkpoint.manifest.frozen.items() if name in state}
    found = fingerprints([state[name] for name in left_out])
    for (name, record), fingerprint in zip(left_out.items(), found, strict=True):
        if fingerprint != record.fingerprint:
            raise CheckpointError(
                f"The base model is not that of the run: {name} has other values. Give the same one with --base"
            )


def _own_name(name: str, adapter: str) -> str:
    return name if adapter == "default" else name.replace(".default.", f".{adapter}.")
