"""Writes images as files into the workspace. Each file is complete or doesn't exist."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..account.step_lines import TEMPORARY, write_whole
from ..checkpoint.format.layout import step_name
from ..errors import describe
from ..hook import BaseHook
from ..images import flatten_images, to_pil
from ..paths import parse_path, placed

if TYPE_CHECKING:
    from PIL import Image

    from ..trainer import BaseTrainer

_MAX_NAME_BYTES = 255  # limit of the usual file systems


class ImageFileLoggerHook(BaseHook):
    """Writes the images of `trainer.log_images` as files, on rank 0: `images/step_0001000/<key>/<subkey>.png`.

    Images may be Pillow's, tensors or numpy arrays (H x W or C x H x W, floats in [0, 1] or uint8). A batch of them,
    N x C x H x W, becomes one grid. All images are checked before the first one is written. Each file is complete or
    doesn't exist, even if the run is killed. A step that is repeated after a resume overwrites its files. If the disk
    raises an error, it is logged, and training continues.

    If there are DTensors among the images, call `log_images` on every rank.

    Args:
        image_format: File extension of a format that Pillow can write, for example "png", "jpeg" or "webp". Or a
            function that returns it for the key of an image, "samples/ema".
        path: Folder, relative to the trainer's `workspace`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Pillow cannot write `image_format`.
    """

    def __init__(self, image_format: str | Callable[[str], str] = "png", *, path: Path | str = "images") -> None:
        if isinstance(image_format, str):
            _check_format(image_format, "`image_format`")
        elif not callable(image_format):
            raise TypeError(f"`image_format` must be a string or a callable, but is {describe(image_format)}.")
        if not isinstance(path, Path | str):
            raise TypeError(f"`path` must be a path, but is {describe(path)}.")
        self.image_format = image_format
        self.path = parse_path("path", path)
        self.needs_workspace = not self.path.is_absolute()

    def claims(self, workspace: Path) -> list[tuple[str, str]]:
        """What only one hook of a run in `workspace` may do."""
        return [(f"write images into {(workspace / self.path).resolve()}", "path")]

    def on_before_train(self, trainer: BaseTrainer) -> None:
        if trainer.accelerator.is_main_process:
            root = self._root(trainer)
            root.mkdir(parents=True, exist_ok=True)  # fails before the first step if the folder can't be made
            for leftover in root.glob(f"{TEMPORARY}*"):
                leftover.unlink(missing_ok=True)

    def on_log_images(self, trainer: BaseTrainer, records: dict[str, Any], dry_run: bool) -> None:
        images = flatten_images(records)
        extensions = {path: self._checked_extension(path) for path in images}
        if not trainer.accelerator.is_main_process:
            return
        folder = self._root(trainer) / step_name(trainer.step)
        files = {}
        for path, image in images.items():
            key, extension = "/".join(path), extensions[path]
            file = folder.joinpath(*path[:-1], f"{path[-1]}.{extension}")
            files[file] = _checked_encoding(key, to_pil(key, image), extension)
        for file, content in files.items():
            if dry_run:
                trainer.logger.info(f"Would write {file} ({len(content)} bytes).")
                continue
            try:
                write_whole(file, content, self._root(trainer) / f"{TEMPORARY}{uuid.uuid4().hex}")
            except OSError as ex:
                trainer.logger.error(f"Step {trainer.step}: {file} was not written. Training continues. {ex}")

    def _root(self, trainer: BaseTrainer) -> Path:
        return placed(trainer, self.path)

    def _checked_extension(self, path: tuple[str, ...]) -> str:
        """The extension of an image's file. Raises unless its keys are valid names of folders and of a file."""
        key, extension = "/".join(path), self.image_format
        if not isinstance(extension, str):
            extension = _check_format(extension(key), f"`image_format` of `{key}`")
        for name in path:
            if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\:"):
                raise ValueError(
                    f"`{key}` cannot be a file: {name!r} is not the name of a file on every system. Leave out slashes,"
                    ' colons and control characters; folders are made by nesting, `{"samples": {"ema": image}}`.'
                )
            num_bytes = len(f"{name}.{extension}".encode())
            if num_bytes > _MAX_NAME_BYTES:
                raise ValueError(
                    f"`{key}` cannot be a file: a name must be at most {_MAX_NAME_BYTES} bytes long, the extension"
                    f" included, but one is {num_bytes}. Shorten it."
                )
        return extension


def _check_format(extension: Any, name: str) -> str:
    """Return `extension` if Pillow can write it, else raise. `name` is for the error message."""
    if not isinstance(extension, str):
        raise TypeError(f"{name} must be a string, but is {describe(extension)}.")
    from PIL import Image

    try:
        _encode(Image.new("RGB", (1, 1)), extension)
    except (KeyError, OSError, ValueError) as ex:
        raise ValueError(
            f'{name} must be a format that Pillow can write, for example "png", "jpeg" or "webp", but is'
            f" {describe(extension)}."
        ) from ex
    return extension


def _encode(image: Image.Image, extension: str) -> bytes:
    """The content of a file with this extension."""
    from PIL import Image

    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[f".{extension.lower()}"])
    return content.getvalue()


def _checked_encoding(key: str, image: Image.Image, extension: str) -> bytes:
    try:
        return _encode(image, extension)
    except (OSError, ValueError) as ex:
        raise ValueError(
            f"`{key}` cannot be written as {extension}: {ex}. Convert it, for example by `image.convert('RGB')`, or let"
            " `image_format` choose another format for this key."
        ) from ex
