"""The files of a checkpoint, and the manifest that describes them.

```
step_0001000/                 exists only when it is complete
  manifest.json               written last: information on the checkpoint, and the checksum of the tables
  tables.json                 its files, each with its checksum, and its tensors; not in versions 1 and 2
  model/ ema/                 one folder per group of whole tensors
  optim/                      one folder per group of shards: rank_00000.safetensors ...
  state/                      global.json, rank_00000.json ..., each with a .safetensors file if it has tensors
latest -> step_0001000        for people; never read here
.lock                         the process that writes here
.tmp-… .replaced-… .trash-…   never loaded; see `housekeeping`
```
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from ...errors import CheckpointError
from .checks import finite, mapping, number, shown, whole
from .checks import text as checked_text
from .limits import MAX_FILES, MAX_JSON_BYTES, MAX_TENSORS
from .nested import decode, encode, parse_json
from .tables import (
    STATE,
    FileRecord,
    Files,
    FrozenRecord,
    TensorTable,
    read_file_record,
    read_files,
    read_frozen,
    read_tensors,
    tensors_as_json,
)

FORMAT = "trainloop checkpoint"
VERSION = 3
"""2: nested state has tags for types that version 1 turned into lists and dicts. 3: files and tensors are in a separate
file, and rules describe where the parts of a tensor are.
"""

MANIFEST = "manifest.json"
TABLES = "tables.json"
LATEST = "latest"
LOCK = ".lock"
PEFT = "model/peft.json"
"""Configurations of adapters, and peft's names for their tensors; see `state/adapters.py`."""
TEMPORARY, REPLACED, TRASH = ".tmp-", ".replaced-", ".trash-"

_STEP_NAME = re.compile(r"step_(\d{7,})")
_SEAL = '"crc32": '
_SEAL_AT_END = re.compile(rb'"crc32": "([0-9a-f]{8})"\n}\n\Z')
SEAL_BYTES = 32
"""Number of bytes at the end of a manifest that contain the seal."""


def step_name(step: int) -> str:
    """Name of the folder for a step."""
    return f"step_{step:07d}"


def parse_step_name(name: str) -> int | None:
    """The step that a folder name stands for. None: it is not the name of a step."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def weight_file(group: str, part: int, num_parts: int) -> str:
    """Path of a part, counted from 0, of a group of whole tensors. Files are called "model" in every group, because
    `from_pretrained` looks for that name.
    """
    suffix = f"-{part + 1:05d}-of-{num_parts:05d}" if num_parts > 1 else ""
    return f"{group}/model{suffix}.safetensors"


def weight_index_file(group: str) -> str:
    """Path of the index, which says which part has which tensor."""
    return f"{group}/model.safetensors.index.json"


def weight_index(files: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The index, which says which part has which tensor, in the format of Hugging Face's libraries.

    Args:
        files: Path of the part, by tensor name.
        sizes: Size in bytes, by tensor name.
    """
    weight_map = {name: path.rpartition("/")[2] for name, path in files.items()}
    metadata = {"total_size": sum(sizes[name] for name in files)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1)


def state_file(rank: int | None) -> str:
    """Path of the nested state of a rank. None: of the run. Its tensors are in a .safetensors file beside it."""
    return f"{STATE}/{'global' if rank is None else f'rank_{rank:05d}'}.json"


def tensors_beside(path: str) -> str:
    """Path of the tensors of a state file."""
    return path.removesuffix(".json") + ".safetensors"


@dataclass(frozen=True)
class ManifestInfo:
    """The information by which checkpoints are chosen to be loaded and kept."""

    step: int
    seq: int
    """Number of the commit in this folder. A checkpoint with a higher number is newer, whatever its step."""
    run_id: str
    time: float
    """Seconds since 1970, by rank 0's clock."""
    world_size: int
    health: bool
    """Whether all parameters were finite."""
    metrics: Mapping[str, float]
    """By flat name, "val/loss"."""
    num_bytes: int
    """Size of all files except the manifest and its tables."""
    retention: Sequence[Mapping[str, Any]] | None = field(default=None, kw_only=True)
    """The policies of the run, in the form of `retention.describe_policies`. None: not recorded."""
    stopped_by: str = field(default="", kw_only=True)
    """The name of whatever stopped the run with this checkpoint. "": nothing did."""


@dataclass(frozen=True)
class Manifest(ManifestInfo):
    """All information about a checkpoint."""

    versions: Mapping[str, str]
    files: Files
    """By path in the folder: all files except the manifest and its tables."""
    tensors: TensorTable
    """By group and name."""
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The settings of the run, by flat name. Empty: not recorded."""
    frozen: Mapping[str, FrozenRecord] = field(default_factory=dict, kw_only=True)
    """Frozen parameters that are not in the checkpoint, by name. `build_model` provides them."""
    seal: str = field(default="", kw_only=True, compare=False)
    """The CRC-32 at the end of the manifest's text, which identifies a commit. "": not written yet."""

    def info(self) -> ManifestInfo:
        """The smaller record, without the tables of files and tensors."""
        return ManifestInfo(**{field.name: getattr(self, field.name) for field in fields(ManifestInfo)})


class NewerFormatError(CheckpointError):
    """The checkpoint is complete, but only a newer trainloop can read it."""


@dataclass(frozen=True)
class Head:
    """The content of `manifest.json` alone."""

    info: ManifestInfo
    content: Mapping[str, Any]
    """The parsed JSON."""
    tables: FileRecord | None
    """Record of `tables.json`. None in versions 1 and 2, where `content` contains the tables."""


def manifest_texts(manifest: Manifest) -> tuple[str, str]:
    """The texts of `manifest.json` and `tables.json` for a manifest. The last entry of the first is the CRC-32 of all
    text before that entry. The first also contains the CRC-32 of the second.

    Raises:
        CheckpointError: They are larger than `parse_manifest` accepts.
    """
    files = {path: vars(record) for path, record in manifest.files.items()}
    frozen = {name: vars(record) for name, record in manifest.frozen.items()}
    tables = _lines({"files": files, "tensors": tensors_as_json(manifest.tensors), "frozen": frozen}, 3) + "\n"
    raw = tables.encode()
    content = {"format": FORMAT, "version": VERSION, **vars(manifest)}
    for name in ("seal", "files", "tensors", "frozen"):
        del content[name]
    content["metrics"], _ = encode(dict(manifest.metrics))
    content["retention"], _ = encode(manifest.retention)
    content["settings"], _ = encode(dict(manifest.settings))
    content["tables"] = {"num_bytes": len(raw), "crc32": zlib.crc32(raw)}
    written = _sealed(_lines(content, 2).removesuffix("\n}") + ",\n ")
    num_tensors = sum(map(len, manifest.tensors.values())) + len(manifest.frozen)
    for file, what, found, most in (
        (MANIFEST, "bytes", len(written), MAX_JSON_BYTES),
        (TABLES, "bytes", len(raw), MAX_JSON_BYTES),
        (TABLES, "files", len(manifest.files), MAX_FILES),
        (TABLES, "tensors", num_tensors, MAX_TENSORS),
    ):
        if found > most:
            raise CheckpointError(f"{file} would have {found} {what}, but can have {most} at most")
    return written, tables


def parse_head(text: str) -> Head:
    """Parse the text of `manifest.json`. The text may come from anyone; the returned values have the right types.

    Raises:
        NewerFormatError: It is a manifest of a later format version.
        CheckpointError: It is not a manifest, or is damaged, or has impossible values.
    """
    try:
        content = parse_json(text)
    except ValueError as ex:
        raise CheckpointError(f"{MANIFEST} is damaged: it is no JSON ({ex})") from ex
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f'{MANIFEST} is not one of trainloop\'s: it has no `"format": "{FORMAT}"`')
    if text != _sealed(text[: text.rfind(_SEAL)]):
        raise CheckpointError(f"{MANIFEST} is damaged: its text is not what was written (CRC-32 differs)")
    with _damage_of(MANIFEST):
        if whole("version", content["version"], 1) > VERSION:
            raise NewerFormatError(
                f"{MANIFEST} has version {content['version']} of the format, but this trainloop reads versions up to"
                f" {VERSION}; it was written with {shown(content.get('versions'))}. Update trainloop to read it"
            )
        tables = read_file_record("tables", content["tables"]) if content["version"] > 2 else None
        return Head(_info(content), content, tables)


def parse_manifest(text: str, tables: str) -> Manifest:
    """The inverse of `manifest_texts`. The texts may come from anyone. The result has the right types, names only files
    inside the checkpoint, and the parts of each tensor cover it exactly.

    Args:
        text: Text of `manifest.json`.
        tables: Text of `tables.json`. Empty for versions 1 and 2.

    Raises:
        NewerFormatError: It is a manifest of a later format version.
        CheckpointError: It is not a manifest, or is damaged, or has impossible values.
    """
    return complete(parse_head(text), tables)


def complete(head: Head, tables: str) -> Manifest:
    """All information about a checkpoint; see `parse_manifest`."""
    content, source, in_tables = head.content, MANIFEST, head.content
    if head.tables is not None:
        source, raw = TABLES, tables.encode()
        if len(raw) != head.tables.num_bytes:
            raise CheckpointError(f"{TABLES} is damaged: it has {len(raw)} bytes instead of {head.tables.num_bytes}")
        if zlib.crc32(raw) != head.tables.crc32:
            raise CheckpointError(f"{TABLES} is damaged: its text is not what was written (CRC-32 differs)")
        with _damage_of(TABLES):
            in_tables = mapping("tables", parse_json(tables), 3)
    with _damage_of(source):
        files = read_files(in_tables["files"])
        tensors = read_tensors(in_tables["tensors"], files, content["version"])
        frozen = read_frozen(in_tables.get("frozen", {}), tensors)
    with _damage_of(MANIFEST):
        return Manifest(
            **vars(head.info),
            versions={n: checked_text(n, v) for n, v in mapping("versions", content["versions"], MAX_FILES).items()},
            files=files,
            tensors=tensors,
            frozen=frozen,
            settings=mapping("settings", decode(content.get("settings", {}), {}), MAX_TENSORS),
            seal=content["crc32"],
        )


@contextmanager
def _damage_of(file: str) -> Iterator[None]:
    """Inside this context, errors from JSON that trainloop cannot have written are reported as damage."""
    try:
        yield
    except KeyError as ex:
        raise CheckpointError(f"{file} is damaged: it has no {ex}") from ex
    except (ArithmeticError, IndexError, TypeError, ValueError) as ex:
        raise CheckpointError(f"{file} is damaged: {ex}") from ex


def seal_of(end: bytes) -> str:
    """The seal of a manifest, found in the last bytes of its text. "": there is none."""
    match = _SEAL_AT_END.search(end)
    return match[1].decode() if match else ""


def _lines(value: Any, depth: int, indent: str = "\n ") -> str:
    """JSON with one line per entry of the outer objects, so that each file and each tensor has its own line."""
    if not isinstance(value, dict) or not value or not depth:
        return json.dumps(value, allow_nan=False)
    entries = (f"{indent}{json.dumps(key)}: {_lines(item, depth - 1, indent + ' ')}" for key, item in value.items())
    return f"{{{','.join(entries)}{indent[:-1]}}}"


def _sealed(body: str) -> str:
    return f'{body}{_SEAL}"{zlib.crc32(body.encode()):08x}"\n}}\n'


# ---------------------------------------------------------------------- reading, with suspicion


def _info(content: Mapping[str, Any]) -> ManifestInfo:
    metrics = mapping("metrics", decode(content["metrics"], {}), MAX_TENSORS)
    return ManifestInfo(
        step=whole("step", content["step"]),
        seq=whole("seq", content["seq"]),
        run_id=checked_text("run_id", content["run_id"]),
        time=finite("time", content["time"]),
        world_size=whole("world_size", content["world_size"], 1),
        health=_flag("health", content["health"]),
        metrics={checked_text("metrics", name): number(name, value) for name, value in metrics.items()},
        num_bytes=whole("num_bytes", content["num_bytes"]),
        retention=_retention(decode(content.get("retention"), {})),
        stopped_by=checked_text("stopped_by", content.get("stopped_by", "")),
    )


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"`{name}` must be true or false, but is {shown(value)}")
    return value


def _retention(value: Any) -> Sequence[Mapping[str, Any]] | None:
    if value is not None and (type(value) is not list or any(type(policy) is not dict for policy in value)):
        raise ValueError(f"`retention` must be a list of policies, but is {shown(value)}")
    return value
