"""Reads files of weights: safetensors, torch.save, and folders of either."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ..format.boxes import slices
from ..format.dtypes import DTYPES_BY_CODE
from ..sharding import local_box, local_tensor
from .content import Described, Foreign, TensorSource, check_whole, is_flat, load_pickle
from .hand_made import MODEL, open_hand_made

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_NOT_TAKEN = (
    "everything but the weights: optimizer, learning rate schedule, step, position in the data, random generators"
)


class SafetensorsFiles:
    """Tensors in safetensors files. Only the requested parts are read.

    Args:
        files: The file of each tensor, by its name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._by_file: dict[Path, list[str]] = defaultdict(list)
        for name, path in files.items():
            self._by_file[path].append(name)
        self._described: Described = {}
        for path, names in self._by_file.items():
            with _open(path) as file:
                if missing := set(names) - set(file.keys()):
                    raise CheckpointError(f"{path} has no tensor {min(missing)}, which the index says it has")
                for name in names:
                    part = file.get_slice(name)
                    code = part.get_dtype()
                    if code not in DTYPES_BY_CODE:
                        raise CheckpointError(f"{path}: {name} has the dtype {code}, which cannot be read")
                    self._described[name] = (tuple(part.get_shape()), DTYPES_BY_CODE[code])

    def described(self) -> Described:
        return dict(self._described)

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        for path, names in self._by_file.items():
            with _open(path) as file:
                for name in names:
                    target = targets.get(name)
                    if target is not None:
                        box = local_box(target)
                        index = slices(box, (0,) * target.dim())
                        part = file.get_slice(name)[index] if index else file.get_tensor(name)
                        local_tensor(target).copy_(part)


def open_weights(path: Path) -> Foreign:
    """Open a file or folder of weights, or a file in which a script has saved more than weights.

    Raises:
        CheckpointError: It cannot be read, or it is unclear which of several files has the weights.
    """
    if path.is_file() and path.suffix != ".safetensors":
        value = load_pickle(path)
        hand_made = open_hand_made(value, path)
        if hand_made is not None:
            return hand_made
        source: TensorSource | None = check_whole(_state_dict_in(value, path), path)
    else:
        source = find_weights(path) if path.is_dir() else _open_file(path)
    if source is None:
        names = sorted(child.name for child in path.iterdir())
        raise CheckpointError(
            f"Which file of {path} holds the weights cannot be told. Give the file itself: {', '.join(names[:5])}"
        )
    what = "a folder of weights" if path.is_dir() else "a file of weights"
    return Foreign(path, what, {"model": source}, not_taken=(_NOT_TAKEN,))


def find_weights(folder: Path) -> TensorSource | None:
    """The weights in a folder: in a file with a usual name, or in the only file that may contain weights. None: there
    is no such file, or more than one.
    """
    for name in (SAFE, PICKLED):
        if (folder / name).is_file():
            return _open_file(folder / name)
        if (folder / f"{name}{_INDEX}").is_file():
            return _open_parts(folder, f"{name}{_INDEX}")
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")]
    return _open_file(files[0]) if len(files) == 1 else None


def _open_file(path: Path) -> TensorSource:
    if path.suffix == ".safetensors":
        with _open(path) as file:
            names = list(file.keys())
        return SafetensorsFiles(dict.fromkeys(names, path))
    return check_whole(_state_dict_in(load_pickle(path), path), path)


def _open_parts(folder: Path, index: str) -> TensorSource:
    try:
        files: dict[str, str] = json.loads((folder / index).read_bytes())["weight_map"]
    except (ValueError, KeyError) as ex:
        raise CheckpointError(f"{folder / index} is no index of weights: {ex}") from ex
    if outside := [name for name in files.values() if Path(name).name != name]:
        raise CheckpointError(f"{folder / index} names a file that is not in its folder: {outside[0]}")
    if index.startswith(SAFE):
        return SafetensorsFiles({name: folder / file for name, file in files.items()})
    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(files.values()):
        tensors.update(_state_dict_in(load_pickle(folder / file), folder / file))
    return check_whole(tensors, folder)


def _state_dict_in(value: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """A model's state: the value itself, or an entry of it under one of the usual keys."""
    candidates = [value]
    if isinstance(value, Mapping):
        candidates += [value[key] for key in MODEL if key in value]
    for candidate in candidates:
        if is_flat(candidate):
            return candidate  # type: ignore[no-any-return]
    keys = ", ".join(map(str, list(value)[:5])) if isinstance(value, Mapping) else type(value).__name__
    raise CheckpointError(
        f"{path} holds no model's state: neither tensors by name, nor a dict with these under one of"
        f" {', '.join(MODEL)}. It holds: {keys}"
    )


def _open(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as ex:
        raise CheckpointError(f"{path} cannot be read: {ex}") from ex
