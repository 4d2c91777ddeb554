"""Token ids in memory-mapped files, cut into windows: data for pre-training."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ..errors import check_int, describe
from ..rng import derived_seed
from .order import EpochOrdered, permutation

INDEX = "index.json"
TOKENS = "tokens.bin"
FORMAT = "trainloop tokens 1"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.uint8, torch.uint16, torch.uint32)}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in (torch.int16, torch.int32, torch.int64)}
_BLOCK = 1 << 24  # tokens that are examined at a time


class TokenDataset(EpochOrdered):
    """Windows of token ids from memory-mapped files, for `build_data_loader` and `build_eval_data_loader`.

    The files are read as one long sequence. Sample `i` is a tensor of `sequence_length + 1` ids (int64), and the next
    sample begins with its last id. So `batch[:, :-1]` are the inputs and `batch[:, 1:]` the targets, and each id is
    predicted once.

    With `DataLoader(..., shuffle=True)`, the trainer cuts the sequence differently in each epoch: the first window
    begins at an offset in [0, sequence_length), and the windows are permuted. Both depend only on the seed and the
    epoch, so a run resumes exactly, at any number of processes and workers. Without `shuffle`, the windows come in
    order, from the first id on. Each epoch leaves out at most `2 * sequence_length` ids at the ends of the sequence.

    Nothing is copied: processes and workers on one machine share the pages of the files. Each maps the files itself.

    Args:
        paths: A path or several: folders that `trainloop tokens` wrote, or files that contain only ids.
        sequence_length: Number of ids that the model sees.
        dtype: Dtype of the ids in the files: `torch.uint16` or another integer type, or its name. None: the dtype in
            the folder's index.
        vocab_size: Each id must be less than this. A folder's index contains its largest id; other files are read once
            for this check, whenever a data set is constructed.

    Raises:
        FileNotFoundError: A path does not exist.
        TypeError: An argument has another type.
        ValueError: A file is empty, does not contain whole ids or does not match its index. Or all files together are
            shorter than a window. Or an id is out of range.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        sequence_length: int,
        *,
        dtype: torch.dtype | str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        check_int("sequence_length", sequence_length, 1)
        check_int("vocab_size", vocab_size, 1, optional=True)
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not given:
            raise ValueError("`paths` must name a file or folder at least, but is empty.")
        asked = None if dtype is None else _parse_dtype(dtype)
        self.sequence_length = sequence_length
        self._files = [_open(Path(path).absolute(), asked) for path in given]
        self._ends = list(accumulate(file.count for file in self._files))
        self._maps: list[torch.Tensor] | None = None
        num_tokens = self._ends[-1]
        if num_tokens <= sequence_length:
            raise ValueError(
                f"`sequence_length` is {sequence_length}, so a window has {sequence_length + 1} ids, but the files have"
                f" {num_tokens} together. Make it smaller."
            )
        self._num_offsets = min(sequence_length, num_tokens - sequence_length)
        self._num_windows = (num_tokens - self._num_offsets) // sequence_length
        if vocab_size is not None:
            self._check_range(vocab_size)

    def __len__(self) -> int:
        """Number of windows in an epoch."""
        return self._num_windows

    def __getitem__(self, index: int) -> torch.Tensor:
        """A window. An index of `len` or more, as `epoch_indices` returns them, names a window at another offset."""
        if index < 0:
            index += self._num_windows
        offset, window = divmod(index, self._num_windows)
        if not 0 <= offset < self._num_offsets:
            raise IndexError(f"The data set has {self._num_windows} windows, but the index is {index}.")
        return self._read(offset + window * self.sequence_length, self.sequence_length + 1)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))  # otherwise Python would continue with windows at other offsets

    def epoch_indices(self, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
        if not shuffle:
            return torch.arange(self._num_windows)
        offset = derived_seed(seed, epoch, "offset") % self._num_offsets
        return permutation(self._num_windows, seed, epoch, "windows").add_(offset * self._num_windows)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": None}

    def _read(self, start: int, count: int) -> torch.Tensor:
        """`count` ids from `start` on."""
        maps = self._maps = self._maps or [file.map() for file in self._files]
        pieces = []
        i = bisect_right(self._ends, start)
        while count:
            begin = start - (self._ends[i - 1] if i else 0)
            pieces.append(maps[i][begin : begin + count].to(torch.int64, copy=True))
            start, count, i = start + len(pieces[-1]), count - len(pieces[-1]), i + 1
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _check_range(self, vocab_size: int) -> None:
        for file in self._files:
            least, greatest = file.range()
            if least < 0 or greatest >= vocab_size:
                raise ValueError(
                    f"The ids must be in [0, {vocab_size}), by `vocab_size`, but those of {file.path} are in [{least},"
                    f" {greatest}]. Either another tokenizer wrote the file, or `dtype` is not {file.dtype}."
                )


@dataclass
class _TokenFile:
    path: Path
    dtype: torch.dtype
    count: int
    max_id: int | None
    """From the index."""

    def map(self) -> torch.Tensor:
        """The ids, memory-mapped. The mapping is private: writing to it does not change the file."""
        if self.path.stat().st_size != self.count * self.dtype.itemsize:
            raise ValueError(f"{self.path} has changed since the data set was made.")
        return torch.from_file(str(self.path), shared=False, size=self.count, dtype=self.dtype)

    def range(self) -> tuple[int, int]:
        """The smallest and the largest id."""
        if self.max_id is not None:
            return 0, self.max_id
        blocks = [block.to(torch.int64).aminmax() for block in torch.split(self.map(), _BLOCK)]
        return min(int(block.min) for block in blocks), max(int(block.max) for block in blocks)


def _open(path: Path, asked: torch.dtype | None) -> _TokenFile:
    if not path.exists():
        raise FileNotFoundError(f"`paths` names {path}, which does not exist.")
    index: dict[str, Any] = {}
    if path.is_dir():
        index, path = _read_index(path / INDEX), path / TOKENS
    dtype = DTYPES[index["dtype"]] if index else asked
    if dtype is None:
        raise ValueError(
            f"{path} has no index, so `dtype` must say of which type its ids are, for example `dtype=torch.uint16`."
        )
    if asked not in (None, dtype):
        raise ValueError(f"`dtype` is {asked}, but the index of {path.parent} says {dtype}.")
    num_bytes = path.stat().st_size
    count, rest = divmod(num_bytes, dtype.itemsize)
    if rest or not count:
        raise ValueError(
            f"{path} must have a whole number of ids of {dtype}, but has {num_bytes} bytes. Either it was cut off, or"
            " `dtype` is another."
        )
    if index and count != index["count"]:
        raise ValueError(f"{path} has {count} ids, but its index says {index['count']}. Write the folder again.")
    return _TokenFile(path, dtype, count, index.get("max_id"))


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}")
        return {
            "dtype": str(DTYPES[index["dtype"]]).removeprefix("torch."),
            "count": int(index["count"]),
            "max_id": int(index["max_id"]),
        }
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} has no {INDEX}, so `trainloop tokens` did not write it. Give the files in it, and `dtype`."
        ) from None
    except (KeyError, TypeError, ValueError) as ex:
        raise ValueError(f"{path} is not an index of `trainloop tokens`: {ex!r}.") from ex


def _parse_dtype(dtype: Any) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, torch.dtype | str) or name not in DTYPES:
        raise TypeError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {describe(dtype)}.")
    return DTYPES[name]
