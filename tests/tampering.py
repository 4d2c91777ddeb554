"""What somebody may do to a checkpoint: seals made anew, so that only suspicion helps."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainloop.checkpoint.format import layout
from trainloop.checkpoint.format.catalog import read_manifest


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> None:
    """Change a manifest with its tables, and make their checksums anew; the records of the files become those of the
    files on the disk.
    """
    content = contents(folder)
    for path, record in content["files"].items():
        if (folder / path).is_file():
            raw = (folder / path).read_bytes()
            record.update(num_bytes=len(raw), crc32=zlib.crc32(raw))
    change(content)
    write_sealed(folder, content)


def contents(folder: Path) -> dict[str, Any]:
    """The JSON of a manifest and of its tables, as one object."""
    content: dict[str, Any] = json.loads((folder / layout.MANIFEST).read_text())
    del content["crc32"], content["tables"]
    return content | json.loads((folder / layout.TABLES).read_text())


def write_sealed(folder: Path, content: Any) -> None:
    """Write the JSON of a manifest and of its tables, each into its file."""
    content = dict(content)
    raw = json.dumps({name: content.pop(name) for name in ("files", "tensors", "frozen") if name in content}).encode()
    content.setdefault("tables", {"num_bytes": len(raw), "crc32": zlib.crc32(raw)})
    (folder / layout.TABLES).write_bytes(raw)
    body = json.dumps(content).removesuffix("}")
    (folder / layout.MANIFEST).write_text(layout._sealed(f"{body}, "))


def rewrite(folder: Path, **fields: Any) -> None:
    """Give a manifest other fields."""
    texts = layout.manifest_texts(dataclasses.replace(read_manifest(folder), **fields))
    for name, text in zip((layout.MANIFEST, layout.TABLES), texts, strict=True):
        (folder / name).write_text(text)


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file, and leave the bytes of the tensors."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def set_to(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path, target: Path) -> None:
    shutil.move(path, target)
    path.symlink_to(target)
