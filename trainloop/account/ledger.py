"""The ledger: a small record per step and rank, with which a resumed run checks that it repeats steps exactly.

```
workspace/ledger/
  rank_00000.bin        records of 32 bytes, appended
  rank_00000.old.bin    earlier records, after the file had become long
```

| kind | step | value | first | second |
| --- | --- | --- | --- | --- |
| life | the step resumed from | number of the run's first life | number of the life | world size |
| step | the step | gradient norm | checksum of the position in the data | checksum of the learning rates |
| loss | the step | this rank's share of the loss | 0 | 0 |

A record is little-endian: step (8 bytes), value (8, a double), first (4), second (4), kind (1), 3 unused bytes, and the
CRC-32 of these 28 bytes. Records are written without a sync, so they survive the end of the process, but not a loss of
power. Truncated or damaged records are skipped.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

LEDGER = "ledger"
"""Name of the folder in the workspace."""

_FIELDS = struct.Struct("<QdIIB3x")
_CRC = struct.Struct("<I")
_SIZE = _FIELDS.size + _CRC.size
_LIFE, _STEP, _LOSS = 1, 2, 3
_MAX_FILE_BYTES = 2**23  # a quarter of a million records; two such files are kept
_MAX_RECORDS = 8  # records that may be lost if the process is killed
_MAX_SECONDS = 0.5  # that a record may wait to be written if steps are slow


class StepBits(NamedTuple):
    """The values by which a step is compared."""

    norm: float
    position: int
    """Checksum of the position in the data after the step."""
    rates: int
    """Checksum of the learning rates."""


@dataclass
class LedgerLife:
    """The records of one life and rank."""

    number: int
    first_life: int
    """Number of the run's first life. Records of another run in the same workspace have another number."""
    world_size: int
    start_step: int
    steps: dict[int, StepBits] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    """Losses of the steps whose loss was read from the device."""


class Ledger:
    """Writes the records of one rank. Each method may raise an `OSError`.

    Args:
        folder: The ledger's folder.
        rank: This process's rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank_{rank:05d}.bin"
        self._file: int | None = None
        self._records: list[bytes] = []  # records and their checksums, alternating
        self._last_write = time.monotonic()
        self._num_bytes = 0
        self._life: tuple[int, int, int, int] = (0, 0, 0, 0)

    def last_word(self) -> tuple[float, int]:
        """Time of the last write, and the last step in the file. Zeros: there is no file."""
        try:
            written = self.path.stat().st_mtime
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size // _SIZE - 64) * _SIZE)
                records = [record for record in _parse(file.read()) if record[4] != _LOSS]
        except OSError:
            return 0.0, 0
        return written, records[-1][0] if records else 0

    def open(self, life: int, first_life: int, world_size: int, start_step: int) -> None:
        """Begin to write the records of a life. An unfinished record of a killed process is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._life = (life, first_life, world_size, start_step)
        self._open()

    def _open(self) -> None:
        life, first_life, world_size, start_step = self._life
        file = self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(file).st_size
        self._num_bytes = size - size % _SIZE
        if size % _SIZE:
            os.ftruncate(file, self._num_bytes)
        self._add(start_step, float(first_life), life, world_size, _LIFE)
        self.flush()

    def add_step(self, step: int, norm: float, position: int, rates: int) -> None:
        """Record a step. It is written together with others, or if the last write is long ago."""
        self._add(step, norm, position, rates, _STEP)
        if len(self._records) >= 2 * _MAX_RECORDS or time.monotonic() - self._last_write > _MAX_SECONDS:
            self.flush()

    def add_loss(self, step: int, loss: float) -> None:
        """Record a loss. It is written with the next step or flush."""
        self._add(step, loss, 0, 0, _LOSS)

    def _add(self, *values: Any) -> None:
        packed = _FIELDS.pack(*values)
        self._records.append(packed)
        self._records.append(_CRC.pack(zlib.crc32(packed)))

    def flush(self) -> None:
        """Write the recorded data."""
        self._last_write = time.monotonic()
        if not self._records or self._file is None:
            return
        written = b"".join(self._records)
        self._records.clear()
        os.write(self._file, written)
        self._num_bytes += len(written)
        if self._num_bytes >= _MAX_FILE_BYTES:
            os.close(self._file)
            self._file = None
            os.replace(self.path, _older(self.path))
            self._open()

    def close(self) -> None:
        """Write the recorded data, and close the file."""
        try:
            self.flush()
        finally:
            file, self._file = self._file, None
            if file is not None:
                os.close(file)


def read_ledger(folder: Path, rank: int) -> list[LedgerLife]:
    """The records of a rank by life, the oldest first. Empty: there are no records."""
    path = folder / f"rank_{rank:05d}.bin"
    lives: list[LedgerLife] = []
    for one in (_older(path), path):
        try:
            raw = one.read_bytes()
        except FileNotFoundError:
            continue
        for step, value, first, second, kind in _parse(raw):
            if kind == _LIFE:
                if not lives or lives[-1].number != first:  # a long life has several such records, one per file
                    lives.append(LedgerLife(first, int(value), second, step))
            elif lives and kind == _STEP:
                lives[-1].steps[step] = StepBits(value, first, second)
            elif lives and kind == _LOSS:
                lives[-1].losses[step] = value
    return lives


def ranks_in(folder: Path) -> list[int]:
    """The ranks that have records."""
    numbers = [path.name[len("rank_") : -len(".bin")] for path in folder.glob("rank_*.bin")]
    return sorted(int(number) for number in numbers if number.isdigit())


def _older(path: Path) -> Path:
    return path.with_suffix(".old.bin")


def _parse(raw: bytes) -> Iterable[tuple[int, float, int, int, int]]:
    for start in range(0, len(raw) - _SIZE + 1, _SIZE):
        end = start + _FIELDS.size
        if zlib.crc32(raw[start:end]) == _CRC.unpack_from(raw, end)[0]:
            yield _FIELDS.unpack_from(raw, start)
