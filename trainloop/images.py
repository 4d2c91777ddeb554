"""Convert the images that `log_images` accepts, nested and of several kinds, to Pillow images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import describe
from .records import flatten_objects

if TYPE_CHECKING:
    from PIL import Image

_CHANNELS = (1, 3, 4)
_PADDING = 2  # pixels between the images of a grid
_HALF_LEVEL = 0.5 / 255


def flatten_images(records: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Flatten nested images. Call on every rank that has them: gathering a DTensor is a collective.

    Args:
        records: Nested mappings of images; a list or tuple counts as a mapping from "0", "1", and so on.

    Returns:
        The images, not checked yet. Each key is the tuple of the keys that lead to the image.

    Raises:
        TypeError: `records` is not a mapping, or a key is not a string.
    """
    return flatten_objects(records, "log_images", "images")


def to_pil(key: str, value: Any) -> Image.Image:
    """Convert a value to a Pillow image.

    Args:
        key: Name of the image in error messages, for example "samples/ema".
        value: A Pillow image, which is returned as it is, or a tensor or numpy array, uint8 or floats in [0, 1], on any
            device. A tensor is H x W, C x H x W with C = 1 (grey), 3 (RGB) or 4 (RGBA), or N x C x H x W, which becomes
            a nearly square grid, row by row, with 2 black pixels between its images. In an array the channels may also
            come last, if the shape leaves no doubt. Floats are rounded to the nearest of 256 levels; values that are
            outside [0, 1] by less than half a level count as 0 and 1.

    Raises:
        TypeError: `value` is not an image, or has another dtype.
        ValueError: `value` has another shape, is empty, or holds floats outside [0, 1] or NaN.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    pixels = _levels(key, _channels_last(key, _array(key, value), is_tensor=isinstance(value, torch.Tensor)))
    if pixels.ndim == 4:
        pixels = _grid(pixels)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _array(key: str, value: Any) -> np.ndarray[Any, Any]:
    """`value` on the host, as uint8 or floats."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.uint8 and not value.dtype.is_floating_point:
            raise _wrong_dtype(key, value.dtype)
        try:
            value = value.detach().cpu()
            # numpy has neither bfloat16 nor the 8-bit floats
            array: np.ndarray[Any, Any] = (value if value.dtype == torch.uint8 else value.float()).numpy()
        except (RuntimeError, TypeError) as ex:
            raise TypeError(f"`{key}` must be a dense tensor with data, but cannot be read: {ex}") from ex
        return array
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 and not np.issubdtype(value.dtype, np.floating):
            raise _wrong_dtype(key, value.dtype)
        return value
    raise TypeError(f"`{key}` must be a Pillow image, a tensor or a numpy array, but is {describe(value)}.")


def _channels_last(key: str, array: np.ndarray[Any, Any], is_tensor: bool) -> np.ndarray[Any, Any]:
    """A view as [N x] H x W x C."""
    if array.size == 0:
        raise ValueError(f"`{key}` must have at least one pixel, but has shape {array.shape}.")
    if array.ndim == 2:
        return array[..., None]
    is_first = array.ndim in (3, 4) and array.shape[-3] in _CHANNELS
    is_last = array.ndim in (3, 4) and array.shape[-1] in _CHANNELS and not is_tensor
    if is_first and is_last:
        raise ValueError(
            f"`{key}` has shape {array.shape}, whose channels may be the first or the last dimension. Pass a tensor,"
            " whose channels are the first: `torch.from_numpy(image)`, with `.movedim(-1, -3)` if they are the last."
        )
    if not (is_first or is_last):
        raise ValueError(
            f"`{key}` must be H x W, C x H x W or N x C x H x W, with C = 1, 3 or 4 channels, but has shape"
            f" {array.shape}. A batch without channels gets one by `x[:, None]`."
        )
    return np.moveaxis(array, -3, -1) if is_first else array


def _levels(key: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same image as uint8."""
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if math.isnan(low):
        num_nan = int(np.isnan(array).sum())
        raise ValueError(f"`{key}` must be finite, but {num_nan} of its {array.size} values are NaN.")
    if low <= -_HALF_LEVEL or high >= 1 + _HALF_LEVEL:
        raise ValueError(
            f"`{key}` must be in [0, 1], because its values are floats, but is in [{low:g}, {high:g}]. Map it there,"
            " for example by `(x + 1) / 2` and `x.clip(0, 1)`; levels of 0 to 255 must be uint8."
        )
    levels: np.ndarray[Any, Any] = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    return levels


def _grid(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """N x H x W x C as one image of rows and columns, as close to a square as possible."""
    num_images, height, width, num_channels = images.shape
    num_columns = min(num_images, math.ceil(math.sqrt(num_images * height / width)))
    num_rows = math.ceil(num_images / num_columns)
    cell_height, cell_width = height + _PADDING, width + _PADDING
    grid = np.zeros((num_rows * cell_height, num_columns * cell_width, num_channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // num_columns * cell_height, i % num_columns * cell_width
        grid[top : top + height, left : left + width] = image
    return grid[:-_PADDING, :-_PADDING]


def _wrong_dtype(key: str, dtype: Any) -> TypeError:
    return TypeError(f"`{key}` must be uint8 or of floats in [0, 1], but has dtype {dtype}. Convert it first.")
