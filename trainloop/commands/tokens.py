"""`trainloop tokens`: converts texts to token ids."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data import write_tokens
from .parser import add_command


def add(areas: Any) -> None:
    """Add the command to the command line."""
    tokens = add_command(
        areas,
        "tokens",
        _tokens,
        "write texts as token ids, for `trainloop.data.TokenDataset`",
        "Write the ids of texts, one after another, into a folder with a small index. It is whole or not there: the"
        " folder gets its name when it is complete.",
    )
    tokens.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a text")
    tokens.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder, which must not exist yet")
    tokens.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="a tokenizer.json of the package tokenizers, or a folder with one (default: the ids are the bytes)",
    )
    tokens.add_argument(
        "--separator",
        metavar="TOKEN",
        help="what comes after each text: a token by its name, or, without a tokenizer, a number (default: nothing)",
    )


def _tokens(options: argparse.Namespace) -> int:
    count = write_tokens(options.files, options.out, tokenizer=options.tokenizer, separator=options.separator)
    print(f"{len(options.files)} file{'s' if len(options.files) > 1 else ''} -> {options.out}: {count} ids")
    return 0
