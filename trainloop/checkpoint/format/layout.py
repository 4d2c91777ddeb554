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
from .checks import finite, mapping, number, shown, text, whole
from .limits import MAX_FILES, MAX_JSON_BYTES, MAX_TENSORS
from .nested import decode, encode, parse_json
from .tables import STATE, FileRecord, FrozenRecord, TensorRecord, read_files, read_frozen, read_tensors

FORMAT = "trainloop checkpoint"
VERSION = 2
"""2: nested state has tags for types that version 1 made lists and dicts of."""

MANIFEST = "manifest.json"
LATEST = "latest"
LOCK = ".lock"
PEFT = "model/peft.json"
"""Configurations of adapters, and the names that peft has for their tensors; see `state/adapters.py`."""
TEMPORARY, REPLACED, TRASH = ".tmp-", ".replaced-", ".trash-"

_STEP_NAME = re.compile(r"step_(\d{7,})")
_SEAL = '"crc32": '
_SEAL_AT_END = re.compile(rb'"crc32": "([0-9a-f]{8})"\n}\n\Z')
SEAL_BYTES = 32
"""Bytes at the end of a manifest that have the seal in them."""


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
    frozen: Mapping[str, FrozenRecord] = field(default_factory=dict, kw_only=True)
    """Frozen parameters that are not in the checkpoint, by name: `build_model` gives them."""
    seal: str = field(default="", kw_only=True, compare=False)
    """The CRC-32 at the end of its text, by which one commit is told from another; "" before it is written."""

    def info(self) -> ManifestInfo:
        """The small part, without the tables of files and tensors."""
        return ManifestInfo(**{field.name: getattr(self, field.name) for field in fields(ManifestInfo)})


class NewerFormatError(CheckpointError):
    """The checkpoint is whole, but only a newer trainloop can read it."""


def manifest_text(manifest: Manifest) -> str:
    """The manifest as JSON. Its last entry is the CRC-32 of all text before that entry.

    Raises:
        CheckpointError: It is larger than what `parse_manifest` takes.
    """
    content = {"format": FORMAT, "version": VERSION, **vars(manifest)}
    del content["seal"]
    content["metrics"], _ = encode(dict(manifest.metrics))
    content["retention"], _ = encode(manifest.retention)
    content["settings"], _ = encode(dict(manifest.settings))
    written = _sealed(_lines(content, 3).removesuffix("\n}") + ",\n ")
    num_tensors = sum(map(len, manifest.tensors.values())) + len(manifest.frozen)
    for what, found, most in (
        ("bytes", len(written), MAX_JSON_BYTES),
        ("files", len(manifest.files), MAX_FILES),
        ("tensors", num_tensors, MAX_TENSORS),
    ):
        if found > most:
            raise CheckpointError(f"{MANIFEST} would have {found} {what}, but can have {most} at most")
    return written


def parse_manifest(text: str) -> Manifest:
    """The inverse of `manifest_text`. Whoever wrote it: what is returned has the right types, names only files inside
    the checkpoint, and its chunks make up the tensors.

    Raises:
        NewerFormatError: It is a manifest, of a later version than ours.
        CheckpointError: It is none, or not as it was written, or not possible.
    """
    try:
        content = parse_json(text)
    except ValueError as ex:
        raise CheckpointError(f"{MANIFEST} is damaged: it is no JSON ({ex})") from ex
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f'{MANIFEST} is not one of trainloop\'s: it has no `"format": "{FORMAT}"`')
    if text != _sealed(text[: text.rfind(_SEAL)]):
        raise CheckpointError(f"{MANIFEST} is damaged: its text is not what was written (CRC-32 differs)")
    try:
        if whole("version", content["version"], 1) > VERSION:
            raise NewerFormatError(
                f"{MANIFEST} has version {content['version']} of the format, but this trainloop reads versions up to"
                f" {VERSION}; it was written with {shown(content.get('versions'))}. Update trainloop to read it"
            )
        return _manifest(content)
    except KeyError as ex:
        raise CheckpointError(f"{MANIFEST} is damaged: it has no {ex}") from ex
    except (ArithmeticError, IndexError, TypeError, ValueError) as ex:
        raise CheckpointError(f"{MANIFEST} is damaged: {ex}") from ex


def seal_of(end: bytes) -> str:
    """The seal of a manifest, by the last bytes of its text; "": there is none."""
    match = _SEAL_AT_END.search(end)
    return match[1].decode() if match else ""


def _lines(value: Any, depth: int, indent: str = "\n ") -> str:
    """JSON with a line for each entry of the outer objects, so that there is a line for each file and each tensor."""
    if not isinstance(value, dict) or not value or not depth:
        return json.dumps(value, allow_nan=False, default=vars)
    entries = (f"{indent}{json.dumps(key)}: {_lines(item, depth - 1, indent + ' ')}" for key, item in value.items())
    return f"{{{','.join(entries)}{indent[:-1]}}}"


def _sealed(body: str) -> str:
    return f'{body}{_SEAL}"{zlib.crc32(body.encode()):08x}"\n}}\n'


# ---------------------------------------------------------------------- reading, with suspicion


def _manifest(content: dict[str, Any]) -> Manifest:
    metrics = mapping("metrics", decode(content["metrics"], {}), MAX_TENSORS)
    files = read_files(content["files"])
    tensors = read_tensors(content["tensors"], files)
    return Manifest(
        step=whole("step", content["step"]),
        seq=whole("seq", content["seq"]),
        run_id=text("run_id", content["run_id"]),
        time=finite("time", content["time"]),
        world_size=whole("world_size", content["world_size"], 1),
        health=_flag("health", content["health"]),
        metrics={text("metrics", name): number(name, value) for name, value in metrics.items()},
        num_bytes=whole("num_bytes", content["num_bytes"]),
        retention=_retention(decode(content.get("retention"), {})),
        versions={n: text(n, v) for n, v in mapping("versions", content["versions"], MAX_FILES).items()},
        files=files,
        tensors=tensors,
        frozen=read_frozen(content.get("frozen", {}), tensors),
        settings=mapping("settings", decode(content.get("settings", {}), {}), MAX_TENSORS),
        stopped_by=text("stopped_by", content.get("stopped_by", "")),
        seal=content["crc32"],
    )


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"`{name}` must be true or false, but is {shown(value)}")
    return value


def _retention(value: Any) -> Sequence[Mapping[str, Any]] | None:
    if value is not None and (type(value) is not list or any(type(policy) is not dict for policy in value)):
        raise ValueError(f"`retention` must be a list of policies, but is {shown(value)}")
    return value
