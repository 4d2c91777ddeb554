"""Reads folders of torch.distributed.checkpoint (DCP), which Accelerate writes under FSDP2. Runs no code from pickles.

DCP's `.metadata` is a pickle, and so is each value that is not a tensor. torch would let both run code. Here the first
may only contain DCP's own records, and the second is read with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from .content import Described, ForeignOptimizer

_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts only DCP's records, paths and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which DCP's metadata has no use for")


class DcpFolder:
    """A DCP folder. Needs no process group. Each rank reads only the parts that its tensors need.

    Raises:
        CheckpointError: It cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with open(folder / ".metadata", "rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
            self._paths: dict[str, tuple[Any, ...]] = {
                name: tuple(self._metadata.planner_data[name]) for name in self._metadata.state_dict_metadata
            }
        except Exception as ex:  # a pickle may raise anything
            raise CheckpointError(f"{folder / '.metadata'} cannot be read: {ex}") from ex

    def tensors(self, *root: Any) -> DcpTensors:
        """The tensors below a place in the saved nested state. A name is the rest of the path, joined by "/"."""
        found = {
            "/".join(map(str, path[len(root) :])): name
            for name, path in self._paths.items()
            if path[: len(root)] == root and hasattr(self._metadata.state_dict_metadata[name], "size")
        }
        return DcpTensors(self, found)

    def values(self) -> dict[tuple[Any, ...], Any]:
        """The values that are not tensors, by their path in the nested state."""
        names = [name for name, record in self._metadata.state_dict_metadata.items() if not hasattr(record, "size")]
        flat: dict[str, Any] = dict.fromkeys(names)
        self.load(flat)
        return {self._paths[name]: value for name, value in flat.items()}

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor by its flat name."""
        record = self._metadata.state_dict_metadata[name]
        return tuple(record.size), record.properties.dtype

    def load(self, flat: dict[str, Any]) -> None:
        """Fill tensors and replace values, by their flat names."""
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        metadata = self._metadata

        class Reader(FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
                return metadata

        class Planner(DefaultLoadPlanner):
            def load_bytes(self, read_item: Any, value: Any) -> None:
                self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

        planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            load(flat, storage_reader=Reader(self.folder), planner=planner, no_dist=True)
        except Exception as ex:  # torch wraps the errors in its own class
            raise CheckpointError(f"{self.folder} cannot be read: {ex}") from ex


class DcpTensors:
    """Some tensors of a DCP folder, under our names."""

    def __init__(self, folder: DcpFolder, names: Mapping[str, str]) -> None:
        self._folder, self._names = folder, names

    def described(self) -> Described:
        return {name: self._folder.describe(flat) for name, flat in self._names.items()}

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._folder.load({self._names[name]: target.detach() for name, target in targets.items()})


def open_optimizer(folder: Path) -> ForeignOptimizer:
    """Read the result of torch's `get_optimizer_state_dict` that was saved under "optimizer"."""
    dcp = DcpFolder(folder)
    groups: dict[int, dict[str, Any]] = {}
    values: dict[int | str, dict[str, Any]] = {}
    for path, value in dcp.values().items():
        if path[:2] == ("optimizer", "param_groups"):
            groups.setdefault(path[2], {})[path[3]] = value
        elif path[:2] == ("optimizer", "state"):
            values.setdefault(path[2], {})[path[3]] = value
    return ForeignOptimizer([groups[i] for i in sorted(groups)], values, dcp.tensors("optimizer", "state"))
