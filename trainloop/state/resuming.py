"""Resumes with settings that differ from the checkpoint's: which of them win, and what is logged.

The checkpoint wins over the script in everything that it contains: optimizer, hyperparameters, schedule, data position
and seed. `CheckpointingHook(on_resume=…)` names the parts in which the script wins. A name applies once: when it is new
to the run, or when its settings have changed again. So the same command can be killed and started again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..checkpoint.format.layout import Manifest
from ..checkpoint.save.writer import library_versions
from ..errors import describe
from ..step.optimizers import optimizers_of, schedulers_of
from .settings import FUNCTION, Settings

if TYPE_CHECKING:
    from pathlib import Path

    from ..trainer import BaseTrainer

ON_RESUME = ("hyperparameters", "lr_scheduler", "optimizer", "data", "stop")
_WIDTH = 40  # characters of a value in the table


def parse_on_resume(names: Iterable[str] | str) -> tuple[str, ...]:
    """Check the argument `on_resume`."""
    given = (names,) if isinstance(names, str) else names
    if not isinstance(given, Iterable):
        raise TypeError(f"`on_resume` must be names out of {ON_RESUME}, but is {describe(names)}.")
    parsed = tuple(given)
    for name in parsed:
        if name not in ON_RESUME:
            raise ValueError(f"`on_resume` must be names out of {ON_RESUME}, but one is {name!r}.")
    return tuple(name for name in ON_RESUME if name in parsed)


def script_wins(
    on_resume: Collection[str], asked: Mapping[str, Any], saved: Mapping[str, Any], folder: Path
) -> frozenset[str]:
    """The parts in which the script wins at this resume: names from `ON_RESUME`.

    Args:
        on_resume: The hook's argument.
        asked: The script's settings.
        saved: The checkpoint's settings. Empty if it was saved without.
        folder: The checkpoint, for the errors.

    Raises:
        ValueError: The class of the optimizer or schedule differs from the checkpoint's, and the script doesn't win.
            Or learning rates and schedule both differ, and the script wins in only one of them.
    """
    before, differing = saved.get("on_resume", ()), _differing(asked, saved)
    changed = {_name_of(key) for key in differing}
    if "hyperparameters" in changed:
        changed.add("optimizer")
    wins = {name for name in on_resume if name not in before or name in changed}
    if "optimizer" in wins:
        wins |= {"hyperparameters", "lr_scheduler"}
    for name in ("optimizer", "lr_scheduler"):
        if name in differing and name not in wins:
            raise ValueError(
                f"`build_{name}` returns {asked[name] or 'None'}, but {folder} was saved with {saved[name] or 'none'}."
                f' Return that again, or let the script win: `CheckpointingHook(on_resume=["{name}"])`.'
            )
    rates = [key for key in differing if key.startswith("optimizer/") and key.endswith("lr")]
    constants = [key for key in differing if key.startswith("lr_scheduler/")]
    if asked["lr_scheduler"] is not None and len(wins & {"hyperparameters", "lr_scheduler"}) == 1:
        if rates and constants:
            raise ValueError(
                f"The learning rates ({', '.join(rates)}) and the schedule ({', '.join(constants)}) both differ from"
                f' those in {folder}, and one is built on the other. Put both "hyperparameters" and'
                ' "lr_scheduler" into `on_resume`.'
            )
        if rates and "lr_scheduler" in wins:
            raise ValueError(
                f'`on_resume` has "lr_scheduler", but the learning rates, which the schedule is built on, differ from'
                f' those in {folder} as well ({", ".join(rates)}). Put "hyperparameters" into `on_resume` too.'
            )
        if rates or not saved:
            wins.add("lr_scheduler")  # the same schedule, on other learning rates
    return frozenset(wins)


def settings_in_force(asked: Mapping[str, Any], saved: Mapping[str, Any], wins: Collection[str]) -> Settings:
    """The settings of the resumed run."""
    in_force = dict(asked)
    for key, value in saved.items():
        if key in asked and _is_restored(key, wins):
            in_force[key] = value
    return in_force


def settings_to_save(trainer: BaseTrainer, on_resume: Collection[str]) -> Settings:
    """The settings for a checkpoint that is saved now."""
    limits = {"max_steps": trainer._length.max_steps, "max_epochs": trainer.max_epochs}
    return {**trainer.settings, **limits, "seed": trainer.seed, "on_resume": list(on_resume)}


def tell_differences(trainer: BaseTrainer, asked: Mapping[str, Any], manifest: Manifest, wins: Collection[str]) -> None:
    """Log a table of the settings that differ: the checkpoint's value, the script's, and the one that is used."""
    versions = library_versions()
    saved = {**manifest.settings, **manifest.versions}
    in_force, asked = {**trainer.settings, **versions}, {**asked, **versions}
    rows: list[tuple[str, ...]] = [("setting", "checkpoint", "script", "in force", "on_resume")]
    for key in _differing(asked, saved) if manifest.settings else ():
        is_choice = in_force[key] != asked[key] or key.startswith("data/")
        values = (_shown(some[key]) for some in (saved, asked, in_force))
        rows.append((key, *values, _name_of(key) if is_choice else ""))
    if len(rows) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    table = "\n  ".join(lines)
    won = f" The script's values are used for: {', '.join(sorted(wins))}." if wins else ""
    is_surprise = any(in_force[key] != asked[key] or key.startswith("data/") for key, *_ in rows[1:])
    trainer.logger.log(
        logging.WARNING if is_surprise else logging.INFO,
        f"The settings differ from those of the checkpoint of step {manifest.step}.{won} To use the script's value"
        f" instead, put the name in the last column into `CheckpointingHook(on_resume=[…])`.\n  {table}",
    )


def _differing(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ. A setting that only one side has doesn't count; it may come from a library's update."""
    return [
        key for key, value in asked.items() if key in saved and saved[key] != value and (key, value) != ("seed", None)
    ]


def _name_of(key: str) -> str:
    """The name in `on_resume` that a setting belongs to, or ""."""
    if key.startswith("optimizer/"):
        return "hyperparameters"
    section = key.partition("/")[0]
    return section if section in ON_RESUME else ""


def _is_restored(key: str, wins: Collection[str]) -> bool:
    """Whether the checkpoint's value of a setting is used, not the script's."""
    if key == "seed":
        return True
    name = _name_of(key)
    return name not in ("", "data") and name not in wins and not key.startswith(FUNCTION)


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


# ---------------------------------------------------------------------- what the script wins


class ScriptHyperparameters:
    """The script's hyperparameters and schedule, which may overwrite those of a checkpoint.

    Create it before the checkpoint's state is loaded.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._groups = [
            ({key: value for key, value in group.items() if key != "params"}, optimizer.defaults, name)
            for name, optimizer in optimizers_of(trainer._raw_optimizer).items()
            for group in optimizer.param_groups
        ]

    def put_back(self, wins: Collection[str]) -> None:
        """Set the parts in which the script wins, after the state was loaded."""
        scheduler, optimizer = self._trainer.lr_scheduler, self._trainer._raw_optimizer
        schedulers = schedulers_of(scheduler)
        for (own, defaults, name), group in zip(self._groups, optimizer.param_groups, strict=True):
            scheduled = _scheduled(own, defaults) if name in schedulers or "" in schedulers else set()
            if "hyperparameters" in wins:
                group.update({key: value for key, value in own.items() if key not in scheduled})
            if "lr_scheduler" in wins:
                group.update({key: own[key] for key in scheduled})
        if scheduler is not None and "lr_scheduler" in wins:
            move_schedule(scheduler, self._trainer.step)


def _scheduled(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> set[str]:
    """The keys of a parameter group that a schedule sets."""
    scheduled = {key for key in group if key not in defaults and key not in ("name", "param_names")} | {"lr"}
    if "max_momentum" in group:
        scheduled |= {"momentum", "betas"} & group.keys()
    return scheduled


def move_schedule(scheduler: Any, num_steps: int) -> None:
    """Move a new schedule to its position after `num_steps` steps. A `ReduceLROnPlateau` stays at its beginning."""
    for part in schedulers_of(scheduler).values():
        if isinstance(part, ReduceLROnPlateau):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps, which another process has taken
            for _ in range(num_steps):
                part.step()


# ---------------------------------------------------------------------- does the run end here?


def check_schedule_length(trainer: BaseTrainer) -> None:
    """Raise if the schedule ends before the run, as OneCycleLR can.

    Raises:
        ValueError: The schedule would raise in the middle of the run.
    """
    for scheduler in schedulers_of(trainer.lr_scheduler).values():
        total_steps = getattr(scheduler, "total_steps", None)
        if not isinstance(total_steps, int):
            continue
        last = trainer.step + total_steps - scheduler.last_epoch
        if trainer.max_steps is not None and trainer.step < trainer.max_steps and last < trainer.max_steps:
            raise ValueError(
                f"`max_steps` is {trainer.max_steps}, but {type(scheduler).__name__} ends at step {last} (its"
                f" `total_steps` is {total_steps}), and cannot go on after it. Build it for `max_steps` steps; if it"
                ' comes from a checkpoint, let the script\'s win with `CheckpointingHook(on_resume=["lr_scheduler"])`.'
            )


def stays_stopped(trainer: BaseTrainer, manifest: Manifest, on_resume: Collection[str]) -> bool:
    """Whether a run that was stopped ends again at once. Logs it."""
    if "stop" in on_resume and "stop" not in manifest.settings.get("on_resume", ()):
        return False
    if not manifest.stopped_by or trainer._length.is_raised(manifest.settings):
        return False
    trainer.logger.warning(
        f"The run was stopped after step {trainer.step} by {manifest.stopped_by}, so it ends here. To continue, raise"
        f' {trainer._length.names}, or pass `on_resume=["stop"]` to CheckpointingHook.'
    )
    return True
