"""Exports a group of tensors from a checkpoint: as one safetensors file, or as a folder for `from_pretrained`.

Only pieces of tensors are in memory, never a whole one. The output has a temporary name beside its target until it is
complete and durable.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import CheckpointError
from ..disk.fs import FileSystem
from ..format.boxes import overlap, slices
from ..format.dtypes import DTYPES, dtype_name
from ..format.files import read_regular
from ..format.foreign import has_manifest
from ..format.integrity import Buffer
from ..format.layout import PEFT, Manifest, parse_step_name, weight_file, weight_index
from ..format.limits import MAX_JSON_BYTES
from ..format.nested import parse_json
from ..format.tables import FileRecord, TensorRecord
from ..format.tensorfile import bytes_of, header
from ..load.reader import Checkpoint
from .sources import Sources

FILE_SUFFIX = ".safetensors"
CONFIG = "config.json"
"""The first file that `from_pretrained` reads. A checkpoint has it beside the weights if the run put it there."""

_SAVED_CONFIG = f"model/{CONFIG}"
_INDEX = f"model{FILE_SUFFIX}.index.json"
_EXPORT_FILE = re.compile(
    rf"model(-\d{{5,}}-of-\d{{5,}})?\.safetensors|{re.escape(_INDEX)}|{re.escape(CONFIG)}"
    # From `export_accelerate`:
    r"|pytorch_model_fsdp\.bin|(optimizer|scheduler)(_\d+)?\.bin|scaler\.pt|random_states_\d+\.pkl"
    r"|adapter_config\.json|adapter_model\.safetensors|generation_config\.json"  # from `export_peft`
)
_PIECE_BYTES = 2**20  # larger pieces are slower, because they don't fit into the processor's cache
_SPARE_BYTES = 2**20
"""About the size of headers and index."""
_CAST = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""8-bit floats are not cast: they have no meaning without their scales, which are separate tensors."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    num_tensors: int
    num_files: int
    """Number of files with tensors."""
    num_bytes: int
    """Bytes of tensors."""


def needed_files(manifest: Manifest, group: str) -> dict[str, FileRecord]:
    """The files that an export of a group reads."""
    records = manifest.tensors.get(group, {}).values()
    paths = {_SAVED_CONFIG, *(part.file for record in records for part in record.parts())}
    return {path: record for path, record in manifest.files.items() if path in paths}


def check_output(output: Path, force: bool) -> None:
    """Raise for a path that must not be written to.

    Args:
        output: The path.
        force: Whether an earlier export at this path may be replaced.

    Raises:
        ValueError: The path is inside a checkpoint, it exists, or its name doesn't fit.
    """
    output = Path(os.path.abspath(output))
    if around := [path for path in (output, *output.parents) if has_manifest(path)]:
        raise ValueError(f"{output} lies in a checkpoint, {around[0]}, which must not change. Give another path.")
    if parse_step_name(output.name) is not None:
        raise ValueError(f"{output} has the name of a checkpoint. Give another path.")
    if output.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise ValueError(f"{output} has a pickle's name. Give one that ends in {FILE_SUFFIX}, or a folder's.")
    if not os.path.lexists(output):
        return
    wanted, found = ("a file" if output.suffix == FILE_SUFFIX else "a folder"), _kind(output)
    if wanted != found:
        raise ValueError(f"{output} is {found}, but {wanted} would be written. Give another path.")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else [output.name]
    if names and not force:
        raise ValueError(f"{output} exists. Give another path, or --force to replace it.")
    if others := [name for name in names if output.is_dir() and not _EXPORT_FILE.fullmatch(name)]:
        raise ValueError(f"{output} holds what no export wrote: {', '.join(others[:5])}. Give another path.")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"


@torch.no_grad()
def export(
    checkpoint: Checkpoint,
    group: str,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    fs: FileSystem | None = None,
) -> Exported:
    """Write the tensors of a group in a form that other software can read.

    A path that ends in .safetensors becomes one file. It has tied tensors under each of their names, because a strict
    `load_state_dict` needs them. Any other path becomes a folder as made by `save_pretrained`: only the first name of
    tied tensors (transformers ties them itself), several files with an index above `max_shard_bytes`, and the
    checkpoint's `config.json`. A complex tensor is written as pairs of real numbers, as in the checkpoint.

    Args:
        checkpoint: The checkpoint. Its `needed_files` must have been verified.
        group: "model", or another group of the checkpoint.
        output: The path. Missing parent folders are made.
        dtype: Cast floats of 16 bits or more to this dtype. None: keep their dtypes.
        max_shard_bytes: Limit of tensor bytes per file in a folder. A larger tensor gets its own file.
        force: Replace an existing output. A folder is replaced only if an export could have written all its files.
        fs: The disk.

    Raises:
        ValueError: `output` cannot be written to, or exists and `force` is False.
        CheckpointError: The group does not exist, the disk has no space, or `dtype` cannot hold a finite value.
    """
    fs = fs if fs is not None else FileSystem()
    output = Path(os.path.abspath(output))
    check_output(output, force)
    is_file = output.suffix == FILE_SUFFIX
    _check_whole(checkpoint, is_file)
    records = {name: r for name, r in checkpoint.records(group).items() if is_file or r.alias_of is None}
    described = {name: (_target_dtype(record, dtype), record.shape) for name, record in records.items()}
    sizes = {name: math.prod(shape) * target.itemsize for name, (target, shape) in described.items()}
    parts = [list(records)] if is_file else _split(sizes, max_shard_bytes)
    metadata = {"format": "pt", "group": group, "step": str(checkpoint.manifest.step)}  # transformers wants the first

    temporary = output.with_name(f".{output.name}.tmp-{secrets.token_hex(4)}")
    fs.make_dir(output.parent)
    look_for_space(fs, output.parent, sum(sizes.values()))
    try:
        with _opened(checkpoint, records) as (sources, config):
            if not is_file:
                fs.make_dir(temporary)
            files: dict[str, str] = {}
            for i, names in enumerate(parts):
                part = weight_file(group, i, len(parts)).rpartition("/")[2]
                path = temporary if is_file else temporary / part
                write_tensors(fs, path, {name: records[name] for name in names}, sources, dtype, metadata)
                files.update(dict.fromkeys(names, part))
        if not is_file:
            if len(parts) > 1:
                fs.write(temporary / _INDEX, [weight_index(files, sizes).encode()])
            if config is not None:
                fs.write(temporary / CONFIG, [_config(config, dtype)])
            fs.sync_dir(temporary)
        put_in_place(fs, temporary, output)
    except BaseException:
        if os.path.lexists(temporary):
            fs.remove_tree(temporary)
        raise
    return Exported(output, len(records), len(parts), sum(sizes.values()))


def left_out(manifest: Manifest) -> str:
    """A text about the frozen parameters that a checkpoint leaves out. "": it has all."""
    names = sorted(manifest.frozen)
    return f"{len(names)} frozen parameters that `build_model` gives (first: {names[0]})" if names else ""


def _check_whole(checkpoint: Checkpoint, is_file: bool) -> None:
    """Refuse an incomplete folder, because `from_pretrained` would fill it up with random weights."""
    if is_file:
        return
    if PEFT in checkpoint.manifest.files:
        raise ValueError(
            f"{checkpoint.folder} is of a model with adapters, whose names `from_pretrained` doesn't know. Use --format"
            f" peft, with --merge for the whole model, or give a path that ends in {FILE_SUFFIX}"
        )
    if missing := left_out(checkpoint.manifest):
        raise ValueError(
            f"{checkpoint.folder} leaves out {missing}, so it gives no folder for `from_pretrained`. Give a path that"
            f" ends in {FILE_SUFFIX}, and load it with `strict=False`"
        )


# ---------------------------------------------------------------------- the tensors


def write_tensors(
    fs: FileSystem,
    path: Path,
    records: Mapping[str, TensorRecord],
    sources: Sources,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> int:
    """Write a safetensors file of a checkpoint's tensors, under the names of `records`. Returns their bytes."""
    described = {name: (_target_dtype(record, dtype), record.shape) for name, record in records.items()}
    begin, order = header(described, metadata)
    fs.write(path, _buffers(begin, {name: records[name] for name in order}, sources, described))
    return sum(math.prod(shape) * target.itemsize for target, shape in described.values())


def _target_dtype(record: TensorRecord, dtype: torch.dtype | None) -> torch.dtype:
    stored: torch.dtype = DTYPES[record.dtype]
    return dtype if dtype is not None and stored in _CAST else stored


def _split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Split names, in their order, into parts of at most `max_bytes` or a single tensor."""
    parts: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if parts[-1] and total + size > max_bytes:
            parts.append([])
            total = 0
        parts[-1].append(name)
        total += size
    return parts


@contextmanager
def _opened(checkpoint: Checkpoint, records: Mapping[str, TensorRecord]) -> Iterator[tuple[Sources, bytes | None]]:
    """The files with the tensors, and the text of the configuration if there is one."""
    with closing(Sources(checkpoint, records)) as sources:
        try:
            has_config = _SAVED_CONFIG in checkpoint.manifest.files
            config = read_regular(checkpoint.folder, _SAVED_CONFIG, MAX_JSON_BYTES) if has_config else None
        except OSError:
            checkpoint.check_there()  # if the checkpoint is gone, report that instead
            raise
        checkpoint.check_there()
        yield sources, config


def _buffers(
    begin: bytes,
    records: Mapping[str, TensorRecord],
    sources: Sources,
    described: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> Iterator[Buffer]:
    """The bytes of a file. Each buffer is valid until the next one is requested."""
    yield begin
    for name, record in records.items():
        for piece in _pieces(record, sources):
            cast = piece.to(described[name][0])
            finite = cast.isfinite() if cast is not piece else None
            if finite is not None and not finite.all() and not torch.equal(finite, piece.isfinite()):
                raise CheckpointError(f"{name} has values that {dtype_name(cast.dtype)} cannot hold: they would be inf")
            yield bytes_of(cast)


def _pieces(record: TensorRecord, sources: Sources) -> Iterator[torch.Tensor]:
    """A tensor from its first row to its last, in pieces of `_PIECE_BYTES`, or of one row if that is larger."""
    dtype: torch.dtype = DTYPES[record.dtype]
    shape = record.shape or (1,)
    if 0 in shape:
        return
    num_rows = max(1, _PIECE_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
    for first in range(0, shape[0], num_rows):
        box = ((first, *(0 for _ in shape[1:])), (min(num_rows, shape[0] - first), *shape[1:]))
        piece = torch.empty(box[1], dtype=dtype)
        for chunk in record.parts_in(box if record.shape else ((), ())):
            stored = (chunk.offset or (0,), chunk.shape or (1,))
            wanted = overlap(stored, box)
            if wanted is not None:
                target = piece[slices(wanted, box[0])]
                rows = target if target.is_contiguous() else torch.empty(wanted[1], dtype=dtype)
                skipped = (wanted[0][0] - stored[0][0]) * math.prod(stored[1][1:]) * dtype.itemsize
                sources.read_into(chunk.file, chunk.key, skipped, bytes_of(rows))
                if rows is not target:
                    target.copy_(rows)
        yield piece


def _config(text: bytes, dtype: torch.dtype | None) -> bytes:
    """The model's configuration, with the dtype of the exported weights."""
    if dtype is None:
        return text
    config = parse_json(text)
    config.update({key: dtype_name(dtype) for key in ("dtype", "torch_dtype") if key in config})
    return json.dumps(config, indent=2).encode()


# ---------------------------------------------------------------------- the target


def look_for_space(fs: FileSystem, folder: Path, num_bytes: int) -> None:
    """Raise if the disk has no space for so many bytes of tensors."""
    needed, free = num_bytes + _SPARE_BYTES, fs.free_bytes(folder)
    if needed > free:
        raise CheckpointError(
            f"It needs {needed / 2**20:,.1f} MiB, but the disk of {folder} has {free / 2**20:,.1f} MiB free"
        )


def put_in_place(fs: FileSystem, temporary: Path, output: Path) -> None:
    """Rename the temporary output to its final name, durably."""
    replaced = None
    if output.is_dir():  # the rename itself replaces a file
        replaced = output.with_name(f"{temporary.name}-replaced")
        fs.rename(output, replaced)
    try:
        fs.rename(temporary, output)
    except OSError:
        if replaced is not None:
            fs.rename(replaced, output)
        raise
    fs.sync_dir(output.parent)
    if replaced is not None:
        fs.remove_tree(replaced)
