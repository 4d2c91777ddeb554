"""Writes folders of token ids for `TokenDataset`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.disk.fs import FileSystem
from ..errors import describe
from .tokens import FORMAT, INDEX, TOKENS

_TYPES = {"uint8": "B", "uint16": "H", "uint32": "I"}
_NUM_READ = 1 << 22  # bytes of a text that are read at a time


def write_tokens(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    separator: int | str | None = None,
) -> int:
    """Write texts as a folder of token ids for `TokenDataset`. `trainloop tokens` does the same on the command line.

    The folder has the ids of all texts, one after another in the order of `files`, and a small index in JSON. It gets
    its name only when it is complete and on the disk. With several processes, let one of them write
    (`accelerator.main_process_first()`).

    Args:
        files: The texts. With a tokenizer, each is read at once and must be UTF-8.
        out: The folder. It must not exist, or be empty.
        tokenizer: A `tokenizer.json` of the package `tokenizers`, or a folder with one. None: the ids are the bytes.
        separator: The id after each text: the tokenizer's name of a token, or a number. None: no separator.

    Returns:
        The number of ids.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        FileNotFoundError: A file does not exist.
        ImportError: `tokenizer` needs the package `tokenizers`.
        ValueError: There are no ids, a text is not UTF-8, or the tokenizer does not know `separator`.
    """
    out, paths = Path(out).absolute(), [Path(file) for file in files]
    if out.is_dir() and not any(out.iterdir()):
        pass
    elif out.exists() or out.is_symlink():
        raise FileExistsError(f"`out` must not exist yet, but {out} does. Remove it, or choose another folder.")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"`files` names {path}, which is not a file.")
    encode = _Bytes() if tokenizer is None else _Tokenizer(Path(tokenizer))
    end = [] if separator is None else [encode.id_of(separator)]
    disk, written = FileSystem(), _Written()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".tmp-{out.name}-", dir=out.parent) as folder:
        temporary = Path(folder, "tokens")
        disk.make_dir(temporary)
        ids = (piece for path in paths for pieces in (encode(path), [end]) for piece in pieces)
        disk.write(temporary / TOKENS, written.count_all(ids, _TYPES[encode.dtype]))
        if not written.count:
            raise ValueError("`files` hold no id: they are empty.")
        index = {
            "format": FORMAT,
            "dtype": encode.dtype,
            "count": written.count,
            "max_id": written.max_id,
            "vocab_size": encode.vocab_size,
            "tokenizer": encode.name,
            "separator": end[0] if end else None,
        }
        disk.write(temporary / INDEX, [json.dumps(index, indent=1).encode()])
        disk.sync_dir(temporary)
        disk.rename(temporary, out)
        disk.sync_dir(out.parent)
    return written.count


class _Written:
    """Counts what has been written."""

    count = max_id = 0

    def count_all(self, pieces: Iterable[Any], typecode: str) -> Iterator[bytes]:
        for ids in pieces:
            if len(ids):
                self.count += len(ids)
                self.max_id = max(self.max_id, max(ids))
                yield ids if typecode == "B" and isinstance(ids, bytes) else array(typecode, ids).tobytes()


class _Bytes:
    """Uses each byte as an id."""

    dtype, vocab_size, name = "uint8", 256, "bytes"

    def __call__(self, path: Path) -> Iterator[bytes]:
        with open(path, "rb") as file:
            while piece := file.read(_NUM_READ):
                yield piece

    def id_of(self, separator: int | str) -> int:
        try:
            number = int(separator)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < 256:
            raise ValueError(
                f"`separator` must be a number in [0, 256) where no tokenizer is given, but is {describe(separator)}."
            )
        return number


class _Tokenizer:
    """Makes ids with a tokenizer of the package `tokenizers`."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as ex:
            raise ImportError(
                "`tokenizer` needs the package tokenizers. Install it with `pip install tokenizers`."
            ) from ex
        path = path / "tokenizer.json" if path.is_dir() else path
        content = path.read_bytes()
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as ex:
            raise ValueError(f"{path} is not a `tokenizer.json` of the package tokenizers: {ex}") from ex
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=0)
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        self.name = f"{path.name}, sha256 {hashlib.sha256(content).hexdigest()}"
        self._encode: Callable[..., Any] = self._tokenizer.encode

    def __call__(self, path: Path) -> Iterator[list[int]]:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as ex:
            raise ValueError(f"{path} must be a text in UTF-8, but is not: {ex}.") from ex
        yield self._encode(text, add_special_tokens=False).ids

    def id_of(self, separator: int | str) -> int:
        found = separator if isinstance(separator, int) else self._tokenizer.token_to_id(separator)
        if found is None or not 0 <= found < self.vocab_size:
            raise ValueError(f"`separator` must be a token of the tokenizer, but is {describe(separator)}.")
        return int(found)
