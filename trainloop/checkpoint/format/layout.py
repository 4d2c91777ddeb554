"""What lies where in a checkpoint, and the manifest that says so.

```
step_0001000/                 exists only when it is complete
  manifest.json               written last
  model/ ema/                 one folder a group of whole tensors
  optim/                      one folder a group of shards: rank_00000.safetensors ...
  state/                      global.json, rank_00000.json ..., each with a .safetensors beside if it holds tensors
latest -> step_0001000        for people; never read here
.lock                         who writes here
.tmp-… .replaced-… .trash-…   never loaded; see `housekeeping`
```
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ...errors import CheckpointError
from .nested import decode, encode

FORMAT = "trainloop checkpoint"
VERSION = 2
"""2: nested state has tags for types that version 1 made lists and dicts of."""

MANIFEST = "manifest.json"
LATEST = "latest"
LOCK = ".lock"
TEMPORARY, REPLACED, TRASH = ".tmp-", ".replaced-", ".trash-"
STATE = "state"
"""The folder of what is not in a group, so no group may have this name."""

_STEP_NAME = re.compile(r"step_(\d{7,})")
_SEAL = '"crc32": '


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:07d}"


def parse_step_name(name: str) -> int | None:
    """The step of a folder's name; None: it is not the name of a step."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def shard_file(group: str, rank: int) -> str:
    """Path of one rank's part of a group of shards."""
    return f"{group}/rank_{rank:05d}.safetensors"


def weight_file(group: str, part: int, num_parts: int) -> str:
    """Path of a part, from 0, of a group of whole tensors. Named "model" in every group, which is what
    `from_pretrained` looks for.
    """
    suffix = f"-{part + 1:05d}-of-{num_parts:05d}" if num_parts > 1 else ""
    return f"{group}/model{suffix}.safetensors"


def weight_index_file(group: str) -> str:
    """Path of the table that says which part holds which tensor."""
    return f"{group}/model.safetensors.index.json"


def weight_index(files: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The table that says which part holds which tensor, in the form that Hugging Face's libraries read.

    Args:
        files: Path of the part, by the tensor's name.
        sizes: Bytes, by the tensor's name.
    """
    weight_map = {name: path.rpartition("/")[2] for name, path in files.items()}
    metadata = {"total_size": sum(sizes[name] for name in files)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1)


def state_file(rank: int | None) -> str:
    """Path of the nested state of a rank; None: of the run. The tensors in it lie beside, as .safetensors."""
    return f"{STATE}/{'global' if rank is None else f'rank_{rank:05d}'}.json"


def tensors_beside(path: str) -> str:
    """Path of the tensors of a state file."""
    return path.removesuffix(".json") + ".safetensors"


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, which lies in a file under `key`."""

    file: str
    key: str
    offset: tuple[int, ...]
    """Where the box begins in the tensor; () for a 0-dim one."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """A tensor: the chunks cover it, and none overlaps another."""

    dtype: str
    """As torch names it, "bfloat16"."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    alias_of: str | None = None
    """The tensor of the same group that shares its memory (tied weights); the bytes are stored under that name only."""


@dataclass(frozen=True)
class ManifestInfo:
    """What is decided by: which checkpoint is loaded, which are kept."""

    step: int
    seq: int
    """Number of the commit in this folder: a checkpoint with a higher one is newer, whatever its step."""
    run_id: str
    time: float
    """Seconds since 1970, by rank 0's clock."""
    world_size: int
    health: bool
    """Whether all parameters were finite."""
    metrics: Mapping[str, float]
    """By flat name, "val/loss"."""
    num_bytes: int
    """Of all files but the manifest."""
    retention: Sequence[Mapping[str, Any]] | None = field(default=None, kw_only=True)
    """The policies of the run, as `retention.describe_policies` has them. None: it was not written down."""
    stopped_by: str = field(default="", kw_only=True)
    """Who stopped the run with this checkpoint; "": nobody."""


@dataclass(frozen=True)
class Manifest(ManifestInfo):
    """All that a checkpoint says of itself."""

    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    """By path in the folder; all but the manifest."""
    tensors: Mapping[str, Mapping[str, TensorRecord]]
    """By group and name."""
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The settings of the run, by flat name; empty: they were not written down."""

    def info(self) -> ManifestInfo:
        """The small part, without the tables of files and tensors."""
        return ManifestInfo(**{field.name: getattr(self, field.name) for field in fields(ManifestInfo)})


class NewerFormatError(CheckpointError):
    """The checkpoint is whole, but only a newer trainloop can read it."""


def manifest_text(manifest: Manifest) -> str:
    """The manifest as JSON. Its last entry is the CRC-32 of all text before that entry."""
    content = {"format": FORMAT, "version": VERSION, **vars(manifest)}
    content["metrics"], _ = encode(dict(manifest.metrics))
    content["retention"], _ = encode(manifest.retention)
    content["settings"], _ = encode(dict(manifest.settings))
    return _sealed(_lines(content, 3).removesuffix("\n}") + ",\n ")


def parse_manifest(text: str) -> Manifest:
    """The inverse of `manifest_text`.

    Raises:
        NewerFormatError: It is a manifest, of a later version than ours.
        CheckpointError: It is none, or not every character is as it was written.
    """
    try:
        content = json.loads(text)
    except ValueError as ex:
        raise CheckpointError(f"{MANIFEST} is damaged: it is no JSON ({ex})") from ex
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f'{MANIFEST} is not one of trainloop\'s: it has no `"format": "{FORMAT}"`')
    if text != _sealed(text[: text.rfind(_SEAL)]):
        raise CheckpointError(f"{MANIFEST} is damaged: its text is not what was written (CRC-32 differs)")
    if content["version"] > VERSION:
        raise NewerFormatError(
            f"{MANIFEST} has version {content['version']} of the format, but this trainloop reads versions up to"
            f" {VERSION}; it was written with {content.get('versions')}. Update trainloop to read it"
        )
    own: dict[str, Any] = {field.name: content[field.name] for field in fields(Manifest) if field.name in content}
    own["metrics"] = decode(own["metrics"], {})
    own["retention"] = decode(own.get("retention"), {})
    own["settings"] = decode(own.get("settings", {}), {})
    own["files"] = {path: FileRecord(**record) for path, record in own["files"].items()}
    own["tensors"] = {
        group: {name: _tensor_record(record) for name, record in tensors.items()}
        for group, tensors in own["tensors"].items()
    }
    return Manifest(**own)


def _lines(value: Any, depth: int, indent: str = "\n ") -> str:
    """JSON with a line for each entry of the outer objects, so that there is a line for each file and each tensor."""
    if not isinstance(value, dict) or not value or not depth:
        return json.dumps(value, allow_nan=False, default=vars)
    entries = (f"{indent}{json.dumps(key)}: {_lines(item, depth - 1, indent + ' ')}" for key, item in value.items())
    return f"{{{','.join(entries)}{indent[:-1]}}}"


def _sealed(body: str) -> str:
    return f'{body}{_SEAL}"{zlib.crc32(body.encode()):08x}"\n}}\n'


def _tensor_record(record: dict[str, Any]) -> TensorRecord:
    chunks = tuple(
        Chunk(chunk["file"], chunk["key"], tuple(chunk["offset"]), tuple(chunk["shape"])) for chunk in record["chunks"]
    )
    return TensorRecord(record["dtype"], tuple(record["shape"]), chunks, record["alias_of"])
