"""The settings of a run that its checkpoints record: those of the script, when the run is built.

They are flat, so that two runs can be compared row by row: `{"max_steps": 1000, "optimizer/0/lr": 0.1, …}`.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..data.order import sampler_name
from ..data.per_rank import PerRank
from ..data.sampling import sampling_of
from ..ranks import collectives
from ..step.optimizers import optimizers_of, schedulers_of

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

Settings: TypeAlias = "dict[str, Any]"
FUNCTION = "lr_scheduler/function"
"""Start of the keys for a schedule's functions. torch doesn't save functions, so the script's are always used."""

_GIT_SECONDS = 5
_POSITION = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "base_lrs"}
"""Keys in the state of a schedule: its position, and learning rates, which are recorded by parameter group."""


def run_settings(trainer: BaseTrainer) -> Settings:
    """The script's settings. Call on every rank, after the run is built and before anything is restored."""
    return {
        "max_steps": trainer._length.max_steps,
        "max_epochs": trainer.max_epochs,
        "seed": trainer._asked_seed,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "grad_clip": _plain(trainer.grad_clip),
        "mixed_precision": trainer.mixed_precision,
        "deterministic": trainer.deterministic,
        "world_size": collectives.world_size(),
        **({} if trainer.overfit_batches is None else {"overfit_batches": trainer.overfit_batches}),
        **_data_settings(trainer.data_loader),
        **_optimizer_settings(trainer._raw_optimizer),
        **_schedule_settings(trainer.lr_scheduler),
        **(_source_settings() if collectives.rank() == 0 else {}),
    }


def _data_settings(loader: Any) -> Settings:
    if isinstance(loader, PerRank):
        loader = loader.loader
    data, order = loader, type(loader).__name__
    batch_size = getattr(loader, "batch_size", None)
    if isinstance(loader, DataLoader):
        data = loader.dataset
        order = type(data).__name__
        if not isinstance(data, IterableDataset):
            sampler, sampled_batch_size, drop_last = sampling_of(loader)
            batch_size = batch_size or sampled_batch_size
            order = sampler_name(sampler) + (", drop_last" if drop_last else "")
    try:
        length: int | None = len(data)
    except TypeError:
        length = None
    return {
        "data/length": length,
        "data/order": order,
        "batch_size": batch_size if isinstance(batch_size, int) else None,
        "num_workers": getattr(loader, "num_workers", None),
    }


def _optimizer_settings(optimizer: torch.optim.Optimizer) -> Settings:
    settings: Settings = {"optimizer": _types(optimizers_of(optimizer))}
    for name, part in optimizers_of(optimizer).items():
        prefix = f"optimizer/{name}/" if name else "optimizer/"
        for i, group in enumerate(part.param_groups):
            # A schedule has already set the group's `lr` to that of the first step.
            values = {**group, "lr": group.get("initial_lr", group.get("lr"))}
            for key, value in values.items():
                if key not in ("params", "param_names", "initial_lr"):
                    settings[f"{prefix}{i}/{key}"] = _plain(value)
    return settings


def _schedule_settings(scheduler: Any) -> Settings:
    parts = schedulers_of(scheduler)
    settings: Settings = {"lr_scheduler": _types(parts) or None}
    for name, part in parts.items():
        suffix = f"{name}/" if name else ""
        for key, value in _constants(part.state_dict()).items():
            settings[f"lr_scheduler/{suffix}{key}"] = value
        for i, function in enumerate(getattr(part, "lr_lambdas", ())):
            settings[f"{FUNCTION}/{suffix}{i}"] = describe_function(function)
    return settings


def _types(by_name: Mapping[str, Any]) -> str:
    """For example: Adam; muon: Muon, adamw: AdamW."""
    return ", ".join(f"{name}: {type(one).__name__}" if name else type(one).__name__ for name, one in by_name.items())


def _constants(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key).lstrip("_"): [_constants(item) if isinstance(item, Mapping) else _plain(item) for item in value]
        if isinstance(value, list | tuple)
        else _plain(value)
        for key, value in state.items()
        if key not in _POSITION
    }


def describe_function(function: Any) -> str:
    """A text for a function: its name and the constants that it was made from. The same in every process."""
    if isinstance(function, functools.partial):
        arguments = [*map(repr, map(_plain, function.args))]
        arguments += [f"{key}={_plain(value)!r}" for key, value in sorted(function.keywords.items())]
        return f"{describe_function(function.func)}({', '.join(arguments)})"
    if not isinstance(function, types.FunctionType):
        return type(function).__name__
    code, cells = function.__code__, function.__closure__ or ()
    numbers = [value for value in code.co_consts if isinstance(value, int | float)]
    closure = [
        f"{name}={_plain(cell.cell_contents)!r}"
        for name, cell in zip(code.co_freevars, cells, strict=True)
        if _full(cell)
    ]
    constants = ", ".join([*closure, *map(str, numbers)])
    return f"{function.__qualname__}{f' [{constants}]' if constants else ''}"


def _full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


@functools.cache
def _source_settings() -> Settings:
    """The git commit of the script, and whether tracked files were changed."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    folder = Path(main).absolute().parent if main else Path.cwd()

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"git_commit": commit, "git_is_dirty": None if changes is None else bool(changes)}


def _plain(value: Any) -> Any:
    """A value in a form for JSON. For anything but numbers, texts, containers of them and functions: only its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if isinstance(key, str | int | float)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return describe_function(value)
    return type(value).__name__
