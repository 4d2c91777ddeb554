"""What somebody may do to a checkpoint: seals made anew, so that only suspicion helps."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainloop.checkpoint.format import layout


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> None:
    """Change a manifest and make its checksum anew; the records of the files become those of the files on the disk."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["crc32"]
    for path, record in content["files"].items():
        if (folder / path).is_file():
            raw = (folder / path).read_bytes()
            record.update(num_bytes=len(raw), crc32=zlib.crc32(raw))
    change(content)
    write_sealed(folder, content)


def write_sealed(folder: Path, content: Any) -> None:
    body = json.dumps(content).removesuffix("}")
    (folder / "manifest.json").write_text(layout._sealed(f"{body}, "))


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
