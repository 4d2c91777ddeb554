"""Paths that a user passes: "~" is expanded, and a URL is refused instead of becoming a local folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import describe

if TYPE_CHECKING:
    from .trainer import BaseTrainer


def placed(trainer: BaseTrainer, path: Path) -> Path:
    """The place to write to, for a hook's argument `path`, in the workspace if relative; in a dry run, in scratch."""
    if trainer.scratch is not None and path.is_absolute():
        return trainer.scratch / "elsewhere" / Path(*path.parts[1:])
    return path if trainer.workspace is None else trainer.workspace / path


def parse_path(name: str, path: Path | str) -> Path:
    """The argument `name` as a path. A relative path stays relative.

    Raises:
        TypeError: `path` is not a path.
        ValueError: `path` is a URL, or names the home folder of an unknown user.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`{name}` must be a path, but is {describe(path)}.")
    if re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(path)):  # `Path("s3://bucket")` keeps one slash; "C:/" doesn't match
        raise ValueError(
            f"`{name}` must be a path of the local file system, but is {str(path)!r}. Mount the bucket or the server,"
            " or copy the files after the run."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as ex:
        raise ValueError(f"`{name}` is {str(path)!r}, but there is no such home folder.") from ex


def parse_absolute_path(name: str, path: Path | str) -> Path:
    """The same as `parse_path`, but absolute, so that a later `os.chdir` has no effect."""
    return parse_path(name, path).absolute()
