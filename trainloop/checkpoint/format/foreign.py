"""Recognises files and folders of other tools, to describe them in errors or to import them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from .layout import MANIFEST, REPLACED, TEMPORARY, TRASH, parse_step_name

_MODEL_FILES = {
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
}
_ACCELERATE_FILES = {
    "random_states_0.pkl",
    "optimizer.bin",
    "scheduler.bin",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_0",
    "optimizer_0",
}
_LOADERS = {
    "accelerate": "an `accelerator.save_state` folder, which `accelerator.load_state` reads",
    "dcp": "a torch.distributed.checkpoint (DCP) folder, which `torch.distributed.checkpoint.load` reads",
    "origin": "a checkpoint of trainloop before 1.0, or of the trainer that it descends from",
    "deepspeed": "a DeepSpeed checkpoint, which its engine's `load_checkpoint` reads",
    "trainer": "a checkpoint of transformers' Trainer, whose weights `from_pretrained` reads",
    "transformers": "a transformers model folder, which `from_pretrained` reads",
    "torch": "a torch.save file, which `torch.load` reads",
    "safetensors": "a safetensors file, which `safetensors.torch.load_file` reads",
}
_FILES = {"torch", "safetensors"}
DISTINCT_KINDS = frozenset({"accelerate", "dcp", "deepspeed", "origin", "trainer"})
"""The kinds that are unmistakable. A loose .pt file may be anything."""


IMPORTABLE = frozenset({"accelerate", "origin", "safetensors", "torch", "trainer", "transformers"})
"""The kinds that `importing` can open."""


def has_manifest(path: Path) -> bool:
    """Whether a folder has a manifest, readable or not. Then it is a checkpoint of ours, whatever else is in it."""
    return os.path.lexists(path / MANIFEST)


def is_importable(path: Path) -> bool:
    """Whether a file or folder looks like something that `importing.open_foreign` accepts. A folder with a manifest, or
    with checkpoints in it, is ours and doesn't count.
    """
    return path.exists() and not has_manifest(path) and not _steps_in(path) and foreign_kind(path) in IMPORTABLE


def describe_folder(path: Path) -> str:
    """Describe a path that was given as a checkpoint: the rest of a sentence that begins with "it"."""
    if not path.exists():
        return "does not exist"
    if steps := _steps_in(path):
        return f"holds checkpoints; give one of them: {', '.join(steps[:5])}{', ...' if len(steps) > 5 else ''}"
    kind = foreign_kind(path)
    if kind is not None:
        return f"{'holds' if kind in _FILES and path.is_dir() else 'looks like'} {_LOADERS[kind]}"
    if path.is_file():
        return "is a file, but a checkpoint is a folder"
    if not path.is_dir():
        return "is neither a file nor a folder"
    names = sorted(child.name for child in path.iterdir())
    if path.name.startswith((TEMPORARY, REPLACED, TRASH)):
        return "is what a save or a removal left behind that did not end"
    visible = [name for name in names if not name.startswith(".")]
    return f"has no manifest.json, only: {', '.join(visible[:5])}" if visible else "is empty"


def _steps_in(path: Path) -> list[str]:
    names = (child.name for child in path.iterdir()) if path.is_dir() else ()
    return sorted(name for name in names if parse_step_name(name) is not None)


def foreign_kind(path: Path) -> str | None:
    """The tool whose checkpoint a file or folder looks like. None: no tool that we know."""
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors"
        return "torch" if _is_torch_file(path) else None
    names = {child.name for child in path.iterdir()} if path.is_dir() else set()
    if _ACCELERATE_FILES & names:
        return "accelerate"
    if {"model.pt", "training_state.pt"} <= names:
        return "origin"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return "dcp"
    if "zero_to_fp32.py" in names or any(name.endswith("_optim_states.pt") for name in names):
        return "deepspeed"
    if "trainer_state.json" in names:
        return "trainer"
    if "config.json" in names and _MODEL_FILES & names:
        return "transformers"
    for kind, endings in (("safetensors", (".safetensors",)), ("torch", (".pt", ".pth", ".ckpt", ".bin"))):
        if any(name.endswith(endings) for name in names):
            return kind
    return None


def _is_torch_file(path: Path) -> bool:
    """Whether a file is a zip archive with a pickle in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
