"""Exports a checkpoint as a folder for `accelerator.load_state`, for users who go back to plain Accelerate.

Most of its files are pickles, because that is Accelerate's format. Model and optimizer are in memory once during the
export.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..disk.fs import FileSystem
from ..format.layout import Manifest
from ..format.tables import STATE, FileRecord
from ..format.tensorfile import serialize
from ..load.reader import Checkpoint
from .export import Exported, check_output, left_out, look_for_space, put_in_place

_GROUPS = ("model", "optim", STATE)


def needed_files(manifest: Manifest) -> dict[str, FileRecord]:
    """The files that an export to Accelerate reads."""
    return {path: record for path, record in manifest.files.items() if path.split("/")[0] in _GROUPS}


@torch.no_grad()
def export_accelerate(
    checkpoint: Checkpoint, output: Path, *, fsdp2: bool = False, force: bool = False, fs: FileSystem | None = None
) -> Exported:
    """Write model, optimizer, schedule, loss scale and the CPU's random generators.

    If there are several optimizers and schedules, each gets a file, in the order of `build_optimizer`.

    State that has no place in Accelerate's format is left out: the step, the position in the data, averages of the
    weights, and the state of other hooks. Random generators of a device are left out too, because Accelerate needs
    those of all devices of a process.

    Args:
        checkpoint: The checkpoint. Its `needed_files` must have been verified.
        output: A folder. Missing parent folders are made.
        fsdp2: True: for a script under FSDP2, whose files differ; it must use FULL_STATE_DICT as its state dict type.
            False: for one process or DDP.
        force: Replace an existing output. A folder is replaced only if an export could have written all its files.
        fs: The disk.

    Raises:
        ValueError: `output` cannot be written to, or exists and `force` is False.
        CheckpointError: The disk has no space, or the checkpoint cannot be read.
    """
    fs = fs if fs is not None else FileSystem()
    output = Path(os.path.abspath(output))
    if output.suffix == ".safetensors":
        raise ValueError(f"{output} has a file's name, but `accelerator.load_state` reads a folder. Give another path.")
    check_output(output, force)
    if missing := left_out(checkpoint.manifest):
        raise ValueError(f"{checkpoint.folder} leaves out {missing}, but `load_state` needs them all")
    records = checkpoint.records("model")
    model, state = _read(checkpoint, "model"), checkpoint.global_state()
    if not fsdp2:  # Accelerate reads it with safetensors' `load_model`, which accepts only one of tied tensors
        model = {name: model[name] for name, record in records.items() if record.alias_of is None}
    sizes: Mapping[str, int] = state["optimizer"].get("optimizers", {})
    if fsdp2 and sizes:
        raise ValueError(
            f"{checkpoint.folder} holds {len(sizes)} optimizers, and Accelerate can't load several under FSDP2. Leave"
            " out `--fsdp2`, for one process or DDP."
        )
    optimizers = _optimizers(checkpoint, state["optimizer"], list(sizes.values()), by_name=fsdp2)
    values = [value for one in optimizers for values in one["state"].values() for value in values.values()]
    state_tensors = [value for value in values if hasattr(value, "nbytes")]
    num_bytes = sum(tensor.nbytes for tensor in (*model.values(), *state_tensors))

    temporary = output.with_name(f".{output.name}.tmp-{secrets.token_hex(4)}")
    fs.make_dir(output.parent)
    look_for_space(fs, output.parent, num_bytes)
    try:
        fs.make_dir(temporary)
        if fsdp2:
            _save(fs, temporary / "pytorch_model_fsdp.bin", model)
        else:
            fs.write(temporary / "model.safetensors", serialize(model, {"format": "pt"}))
        for i, optimizer in enumerate(optimizers):
            _save(fs, temporary / _numbered("optimizer", i), optimizer)
        schedules = state["lr_scheduler"]
        is_by_name = bool(schedules) and schedules.keys() <= sizes.keys()
        for i, schedule in enumerate(schedules.values() if is_by_name else [schedules]):
            if schedule is not None:
                _save(fs, temporary / _numbered("scheduler", i), schedule)
        if state["grad_scaler"] is not None:
            _save(fs, temporary / "scaler.pt", state["grad_scaler"])
        for rank in range(checkpoint.manifest.world_size):
            rng = checkpoint.saved_rank_state(rank)["rng"]
            _save(fs, temporary / f"random_states_{rank}.pkl", _random_states(rng))
        fs.sync_dir(temporary)
        put_in_place(fs, temporary, output)
    except BaseException:
        if os.path.lexists(temporary):
            fs.remove_tree(temporary)
        raise
    return Exported(output, len(model), 1, num_bytes)


def _read(checkpoint: Checkpoint, group: str) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(group).items()}
    checkpoint.read_into(group, tensors)
    return tensors


def _numbered(name: str, i: int) -> str:
    """The file name of the i-th object, as in Accelerate."""
    return f"{name}.bin" if i == 0 else f"{name}_{i}.bin"


def _optimizers(
    checkpoint: Checkpoint, saved: Mapping[str, Any], sizes: list[int], by_name: bool
) -> list[dict[str, Any]]:
    """For each optimizer, the state of `Optimizer.state_dict`, or with `by_name` of torch's `get_optimizer_state_dict`.
    `sizes` are the numbers of their groups; empty: there is only one optimizer.
    """
    state = {name: dict(values) for name, values in saved["state"].items()}
    for full_name, tensor in _read(checkpoint, "optim").items():
        name, key = full_name.rsplit("/", 1)
        state[name][key] = tensor
    groups = iter(saved["param_groups"])
    own_groups = [list(itertools.islice(groups, size)) for size in sizes] or [list(groups)]
    return [_optimizer(state, own, by_name) for own in own_groups]


def _optimizer(state: Mapping[str, Any], saved_groups: list[dict[str, Any]], by_name: bool) -> dict[str, Any]:
    names = [name for group in saved_groups for name in group["params"]]
    keys: dict[str, Any] = {name: name if by_name else place for place, name in enumerate(names)}
    groups = []
    for group in saved_groups:
        # JSON turned torch's tuples ("betas") into lists.
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        groups.append({**values, "params": [keys[name] for name in group["params"]]})
    return {"state": {keys[name]: state[name] for name in names if name in state}, "param_groups": groups}


def _random_states(rng: Mapping[str, Any]) -> dict[str, Any]:
    """The CPU's generators in Accelerate's form. Its "step" counts micro-batches of the open window; none is open."""
    version, internal, gauss = rng["python"]
    states: dict[str, Any] = {"step": 0, "random_state": (version, tuple(internal), gauss)}
    if "numpy" in rng:
        kind, keys, position, has_gauss, cached = rng["numpy"]
        states["numpy_random_seed"] = (kind, keys.numpy().astype("uint32"), position, has_gauss, cached)
    return {**states, "torch_manual_seed": rng["torch"]}


def _save(fs: FileSystem, path: Path, value: Any) -> None:
    with open(path, "xb") as file:
        torch.save(value, file)
        fs.sync_file(file)
