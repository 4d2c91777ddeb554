"""Images: what `log_images` is given becomes the pixels that were meant, in whole files, or an error names the key."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainloop import ImageFileLoggerHook
from trainloop.images import flatten_images, to_pil

from .launching import REPOSITORY, environment
from .small import SmallTrainer

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
COLOURS = torch.arange(4 * 5 * 7, dtype=torch.uint8).reshape(4, 5, 7)


def pixels(value: Any) -> Any:
    return np.asarray(to_pil("key", value))


def trained(workspace: Path, *args: Any, **kwargs: Any) -> SmallTrainer:
    """A trainer that has done step 2, with an ImageFileLoggerHook of these arguments."""
    hook = ImageFileLoggerHook(*args, **kwargs)
    trainer = SmallTrainer(2, workspace=workspace, hooks_=lambda self: [hook])
    trainer.train()
    return trainer


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------- pixels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_become_the_levels_that_they_stand_for(dtype: torch.dtype) -> None:
    """Level k, as k / 255, is k again, as a tensor that requires grad and as an array; bfloat16 is off by one at most.
    What is beyond [0, 1] by rounding only is 0 or 255.
    """
    values = (LEVELS / 255).to(dtype).requires_grad_()
    arrays = [] if dtype == torch.bfloat16 else [values.detach().numpy()]
    for value in (values, *arrays):
        difference = pixels(value).astype(int) - LEVELS.numpy()
        assert abs(difference).max() <= (1 if dtype == torch.bfloat16 else 0)
    edges = torch.tensor([[0.0, 0.5, 1.0, 1.0001, -0.0001]], dtype=torch.float64)
    assert pixels(edges).tolist() == [[0, 128, 255, 255, 0]]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_stand_first_in_tensors_and_may_stand_last_in_arrays(channels: int, mode: str) -> None:
    """C x H x W in grey, RGB and RGBA; an array that is H x W x C gives the same image; a view need not be dense."""
    image = COLOURS[:channels]
    wanted = image.permute(1, 2, 0).squeeze(2).numpy()
    for value in (image, image.numpy(), image.permute(1, 2, 0).numpy(), image.flip(1).numpy()[:, ::-1]):
        assert to_pil("key", value).mode == mode
        assert np.array_equal(pixels(value), wanted)


def test_an_image_of_pillow_stays_what_it_is() -> None:
    """The very object."""
    image = Image.new("P", (3, 2))
    assert to_pil("key", image) is image


def test_a_batch_becomes_one_grid_that_is_nearly_square() -> None:
    """Row by row, 2 black pixels between, nothing around; wide images stand in fewer columns; of an array as well."""
    batch = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 5, 5)
    wanted = np.zeros((12, 19, 3), np.uint8)
    for level, (top, left) in enumerate([(0, 0), (0, 7), (0, 14), (7, 0), (7, 7)], start=1):
        wanted[top : top + 5, left : left + 5] = level
    assert np.array_equal(pixels(batch), wanted)
    assert np.array_equal(pixels(batch.permute(0, 2, 3, 1).numpy()), wanted)
    assert to_pil("key", torch.zeros(8, 1, 10, 20)).size == (2 * 20 + 2, 4 * 10 + 3 * 2)
    assert to_pil("key", torch.zeros(2, 1, 40, 2)).size == (2 * 2 + 2, 40)
    assert to_pil("key", torch.zeros(1, 1, 8, 8)).size == (8, 8)


def test_records_are_flattened_by_their_keys() -> None:
    """Mappings at any depth; a list or tuple counts as a mapping from "0" on."""
    assert flatten_images({"a": 1, "b": {"c": [2, {"d": 3}], "e": ()}}) == {
        ("a",): 1,
        ("b", "c", "0"): 2,
        ("b", "c", "1", "d"): 3,
    }


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([LEVELS], "The records of `log_images` must be a mapping of images, but are [tensor("),
        ({3: LEVELS}, "The keys of images must be strings, but the records have 3 (int)."),
        ({"a": [{"b": {3: LEVELS}}]}, "The keys of images must be strings, but `a/0/b` has 3 (int)."),
    ],
)
def test_records_that_are_not_images_by_name_are_refused(records: Any, message: str) -> None:
    """It says where."""
    with pytest.raises(TypeError, match=re.escape(message)):
        flatten_images(records)


WRONG: list[tuple[Any, type[Exception], str]] = [
    ("x.png", TypeError, "must be a Pillow image, a tensor or a numpy array, but is 'x.png' (str)."),
    (0.5, TypeError, "must be a Pillow image, a tensor or a numpy array, but is 0.5 (float)."),
    (LEVELS.int(), TypeError, "must be uint8 or of floats in [0, 1], but has dtype torch.int32."),
    (LEVELS > 3, TypeError, "must be uint8 or of floats in [0, 1], but has dtype torch.bool."),
    (LEVELS.numpy() > 3, TypeError, "must be uint8 or of floats in [0, 1], but has dtype bool."),
    (LEVELS.float().to_sparse(), TypeError, "must be a dense tensor with data, but cannot be read: "),
    (LEVELS.to("meta"), TypeError, "must be a dense tensor with data, but cannot be read: "),
    (torch.tensor(0.5), ValueError, "must be H x W, C x H x W or N x C x H x W, with C = 1, 3 or 4 channels"),
    (torch.zeros(16, 8, 8), ValueError, "but has shape (16, 8, 8). A batch without channels gets one by `x[:, None]`."),
    (torch.zeros(8, 8, 3), ValueError, "but has shape (8, 8, 3)."),
    (torch.zeros(2, 2, 3, 8, 8), ValueError, "but has shape (2, 2, 3, 8, 8)."),
    (np.zeros((3, 8, 3)), ValueError, "has shape (3, 8, 3), whose channels may be the first or the last dimension."),
    (torch.zeros(0, 3, 8, 8), ValueError, "must have at least one pixel, but has shape (0, 3, 8, 8)."),
    (torch.tensor([[0.0, 1.01]]), ValueError, "must be in [0, 1], because its values are floats, but is in [0, 1.01]."),
    (torch.tensor([[-1.0, 1.0]]), ValueError, "but is in [-1, 1]. Map it there, for example by `(x + 1) / 2`"),
    (LEVELS.half(), ValueError, "but is in [0, 255]."),
    (torch.tensor([[0.5, float("inf")]]), ValueError, "but is in [0.5, inf]."),
    (torch.tensor([[0.5, float("nan"), 7]]), ValueError, "must be finite, but 1 of its 3 values are NaN."),
]


@pytest.mark.parametrize(("value", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_is_no_image_is_an_error_that_names_the_key(
    tmp_path: Path, value: Any, error: type[Exception], message: str
) -> None:
    """What is expected, what there is, the remedy; and no file was written, of a good image before it either."""
    trainer = trained(tmp_path)
    with pytest.raises(error, match=r"^`samples/ema` .*" + re.escape(message)):
        trainer.log_images({"good": LEVELS, "samples": {"ema": value}})
    assert files(tmp_path) == []


# ---------------------------------------------------------------------- files


def test_each_image_is_a_file_under_its_keys(tmp_path: Path) -> None:
    """In a folder of the step, and every pixel comes back."""
    batch = torch.rand(9, 3, 8, 8, requires_grad=True)
    trained(tmp_path).log_images({"samples": {"ema": batch, "raw": [COLOURS]}, "a b.é": to_pil("x", LEVELS)})
    step = tmp_path / "images" / "step_0000002"
    assert files(tmp_path / "images") == [f"step_0000002/{n}.png" for n in ("a b.é", "samples/ema", "samples/raw/0")]
    assert np.array_equal(np.asarray(Image.open(step / "samples" / "ema.png")), pixels(batch))
    assert np.array_equal(np.asarray(Image.open(step / "samples" / "raw" / "0.png")), pixels(COLOURS))
    assert np.array_equal(np.asarray(Image.open(step / "a b.é.png")), LEVELS.numpy())


@pytest.mark.parametrize(
    ("extension", "format_"), [("jpg", "JPEG"), ("webp", "WEBP"), ("tiff", "TIFF"), ("PNG", "PNG")]
)
def test_the_format_is_what_was_asked_for(tmp_path: Path, extension: str, format_: str) -> None:
    """As one for all images, in the folder that was asked for."""
    trained(tmp_path, extension, path="a/b").log_images({"grey": LEVELS})
    with Image.open(tmp_path / "a" / "b" / "step_0000002" / f"grey.{extension}") as image:
        assert (image.format, image.size, image.mode in ("L", "RGB")) == (format_, (16, 16), True)


def test_the_format_may_depend_on_the_key(tmp_path: Path) -> None:
    """A callable gets the whole key; an absolute path needs no workspace."""
    hook = ImageFileLoggerHook(lambda key: "png" if key == "mask/alpha" else "jpeg", path=tmp_path)
    trainer = SmallTrainer(1, hooks_=lambda self: [hook])
    trainer.train()
    trainer.log_images({"mask": {"alpha": COLOURS, "grey": LEVELS}})
    assert files(tmp_path) == ["step_0000001/mask/alpha.png", "step_0000001/mask/grey.jpeg"]


def test_a_dry_run_says_what_would_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file and its size; it is not there."""
    trainer = trained(tmp_path)
    with caplog.at_level(logging.INFO, "trainloop"):
        trainer.log_images({"samples": {"ema": LEVELS}}, dry_run=True)
    assert re.search(r"Would write .*/images/step_0000002/samples/ema\.png \(\d+ bytes\)\.", caplog.text)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("..", "x"), "`../x` cannot be a file: '..' is not the name of a file on every system."),
        (("../x",), "`../x` cannot be a file: '../x' is not"),
        (("/etc/x",), "`/etc/x` cannot be a file: '/etc/x' is not"),
        (("a", "."), "`a/.` cannot be a file: '.' is not"),
        (("a", ""), "`a/` cannot be a file: '' is not"),
        (("a\\b",), "`a\\b` cannot be a file"),
        (("C:",), "`C:` cannot be a file"),
        (("a\0b",), "`a\0b` cannot be a file: 'a\\x00b' is not"),
        (("a\nb",), "`a\nb` cannot be a file: 'a\\nb' is not"),
        (("\ud800",), "cannot be a file: '\\ud800' is not"),
        (
            ("a", "é" * 126),
            "cannot be a file: a name must be at most 255 bytes long, the extension included, but one is",
        ),
    ],
)
def test_keys_that_cannot_be_files_are_refused(tmp_path: Path, keys: tuple[str, ...], message: str) -> None:
    """Before anything is written, within the folder or outside."""
    workspace = tmp_path / "runs" / "workspace"
    trainer = trained(workspace)
    records: Any = LEVELS
    for key in reversed(keys):
        records = {key: records}
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.log_images({"good": LEVELS, **records})
    assert files(tmp_path) == []
    trainer.log_images({"é" * 125 + "e": LEVELS, "...": LEVELS})
    assert len(files(workspace)) == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImageFileLoggerHook("gifx"), ValueError, '"png", "jpeg" or "webp", but is \'gifx\' (str).'),
        (lambda: ImageFileLoggerHook("mpg"), ValueError, "`image_format` must be a format that Pillow can write"),
        (lambda: ImageFileLoggerHook("h5"), ValueError, "`image_format` must be a format that Pillow can write"),
        (lambda: ImageFileLoggerHook(""), ValueError, "`image_format` must be a format that Pillow can write"),
        (lambda: ImageFileLoggerHook(3), TypeError, "`image_format` must be a string or a callable, but is 3 (int)."),  # type: ignore[arg-type]
        (lambda: ImageFileLoggerHook(path=3), TypeError, "`path` must be a path, but is 3 (int)."),  # type: ignore[arg-type]
        (
            lambda: SmallTrainer(1, hooks_=lambda self: [ImageFileLoggerHook()]).train(),
            ValueError,
            "ImageFileLoggerHook writes to `workspace`, but it is None.",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_the_run(make: Any, error: type[Exception], message: str) -> None:
    """A format that Pillow knows and cannot write is one of them."""
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("image_format", "image", "message"),
    [
        ("jpeg", COLOURS, "`a/x` cannot be written as jpeg: cannot write mode RGBA as JPEG. Convert it, for example"),
        ("png", Image.new("F", (2, 2)), "`a/x` cannot be written as png: cannot write mode F as PNG."),
        (
            lambda key: "gifx" if key == "a/x" else "png",
            LEVELS,
            "`image_format` of `a/x` must be a format that Pillow can write",
        ),
    ],
)
def test_an_image_that_its_format_cannot_hold_is_an_error(
    tmp_path: Path, image_format: Any, image: Any, message: str
) -> None:
    """It names the key and the remedy, before anything is written."""
    trainer = trained(tmp_path, image_format)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.log_images({"a": {"good": LEVELS, "x": image}})
    assert files(tmp_path) == []


def test_a_step_that_is_done_again_overwrites_its_images(tmp_path: Path) -> None:
    """And what a killed run has left half written is removed at the start."""
    trained(tmp_path).log_images({"x": LEVELS})
    (tmp_path / "images" / ".tmp-0123").write_bytes(b"half")
    trained(tmp_path).log_images({"x": LEVELS.flip(0)})
    assert files(tmp_path / "images") == ["step_0000002/x.png"]
    again = np.asarray(Image.open(tmp_path / "images" / "step_0000002" / "x.png"))
    assert np.array_equal(again, LEVELS.flip(0).numpy())


def test_a_disk_that_refuses_an_image_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log names the file and the cause, the other images are written, and nothing half written stays."""
    trainer = trained(tmp_path)
    (tmp_path / "images" / "step_0000002" / "x.png").mkdir(parents=True)
    trainer.log_images({"x": LEVELS, "y": LEVELS})
    assert re.search(r"Step 2: .*/x\.png was not written\. Training continues\. .*Is a directory", caplog.text)
    assert files(tmp_path / "images") == ["step_0000002/y.png"]


KILLED = """
import sys
import torch
from tests.test_images import trained
trainer = trained(sys.argv[1], "bmp")
for level in range(1000):
    trainer.log_images({"x": torch.full((3, 4000, 4000), level % 251, dtype=torch.uint8)})
"""


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_killed_run_leaves_no_half_image(tmp_path: Path, num_files: int) -> None:
    """SIGKILL while 48 MB are being written, for the first time or over an image: what has the name is whole."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment(), cwd=REPOSITORY)
    deadline = time.monotonic() + 240  # only against a hang
    while len(files(tmp_path)) < num_files and process.poll() is None and time.monotonic() < deadline:
        pass
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert time.monotonic() < deadline, "the image was never seen while it was being written"
    left = [file for file in files(tmp_path / "images") if not file.startswith(".tmp-")]
    assert left == ["step_0000002/x.bmp"] * (num_files - 1)
    for file in left:
        assert len(np.unique(np.asarray(Image.open(tmp_path / "images" / file)))) == 1
