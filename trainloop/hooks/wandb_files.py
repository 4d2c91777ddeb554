"""Reads W&B's files on this machine. They are the only record of an offline run, and any of them may end torn.

A `.wandb` file is a log in LevelDB's format: a header of 7 bytes, then blocks of 32 KiB. The blocks contain pieces of
records; each piece has its checksum, length and kind (whole, first, middle, last). A record is a protobuf message.
wandb writes a block when it is full, and everything every 15 s, so a killed process loses its last rows.
"""

from __future__ import annotations

import glob
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

STEP = "trainer/step"
"""The name of the step in each row."""
_FILE_HEADER = b":W&B"
_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 2**15
_PIECE_HEADER = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def last_step_of(run: Any) -> int:
    """The last step that W&B has of a resumed run. -1: none."""
    if not run.offline:
        return int(run.summary.get(STEP, -1))  # from the server
    folder_of_this_process = Path(run.dir).parent
    last_step = -1
    for file in files_of(folder_of_this_process.parent, run.id):
        if file.parent == folder_of_this_process:
            continue
        if is_empty(file):
            file.rename(file.with_suffix(".empty"))  # otherwise `wandb sync` would stop at it
        elif last_step < 0:
            last_step = max((int(row[STEP]) for row in rows(file) if STEP in row), default=-1)
    return last_step


def files_of(folder: Path, run_id: str) -> list[Path]:
    """The files of the run's processes, the newest first.

    Args:
        folder: W&B's folder, "wandb".
        run_id: The run's id.
    """
    name = glob.escape(run_id)
    files = folder.glob(f"*run-*-{name}*/run-{name}.wandb")  # a second folder of the same second gets a suffix
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def is_empty(file: Path) -> bool:
    """Whether the file has no record: its process was killed before the first block was written."""
    return file.stat().st_size <= _FILE_HEADER_BYTES


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The logged rows, with their values by name, up to the first damaged record."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # created at import

    with file.open("rb") as opened:
        for content in _records(opened):
            try:
                record = Record.FromString(content)
            except DecodeError:
                return
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(file: IO[bytes]) -> Iterator[bytes]:
    if not file.read(_FILE_HEADER_BYTES).startswith(_FILE_HEADER):
        return
    pieces: list[bytes] = []
    while True:
        left_in_block = _BLOCK_BYTES - file.tell() % _BLOCK_BYTES
        if left_in_block < _PIECE_HEADER.size:
            file.read(left_in_block)
        header = file.read(_PIECE_HEADER.size)
        if len(header) < _PIECE_HEADER.size:
            return
        checksum, length, kind = _PIECE_HEADER.unpack(header)
        piece = file.read(length)
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:  # also if the piece is cut off
            return
        if kind in (_WHOLE, _FIRST):
            pieces = []
        pieces.append(piece)
        if kind in (_WHOLE, _LAST):
            yield b"".join(pieces)
