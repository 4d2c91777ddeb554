"""Shared by the hooks for experiment trackers: numbers under flat names, the config, and the handling of failures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..checkpoint.save.writer import library_versions
from ..errors import TrainingError, describe
from ..paths import parse_path
from ..ranks import collectives
from ..records import Records, flatten_nested_dict, without_sequences

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

T = TypeVar("T")

_ARGUMENTS = (
    "max_steps",
    "max_epochs",
    "grad_clip",
    "max_non_finite_grad_retries",
    "mixed_precision",
    "gradient_accumulation_steps",
    "workspace",
    "no_sync_accumulate",
    "seed",
)
_MAX_SHARE = 0.1  # of the run's time may be spent on a failing tracker


def numbers_by_name(records: Records) -> dict[str, int | float]:
    """Nested records as Python numbers, with their keys joined by "/". Each tensor on a device costs a sync.

    Args:
        records: Records that passed `check_records`.
    """
    flat = flatten_nested_dict(without_sequences(records))
    return {"/".join(path): _number(value) for path, value in flat.items()}


def _number(value: Any) -> int | float:
    if isinstance(value, torch.Tensor) or hasattr(value, "item"):  # numpy's scalars
        value = value.item()
    return value if isinstance(value, int | float) else float(value)


# ---------------------------------------------------------------------- the config


def read_config(config: Any) -> dict[str, Any] | None:
    """The argument `config` of a tracker's hook as plain nested values. None stays None.

    Args:
        config: A mapping, the path of a JSON file, or None.

    Raises:
        TypeError: `config` has another type.
        ValueError: The file cannot be read, or does not hold a JSON object.
    """
    if config is None:
        return None
    if isinstance(config, str | Path):
        path = config
        try:
            config = json.loads(parse_path("config", path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as ex:
            raise ValueError(f"`config` must name a JSON file that can be read, but {path} cannot: {ex}") from ex
        if not isinstance(config, Mapping):
            raise ValueError(
                f"`config` must name a JSON file that holds an object, but {path} holds {describe(config)}."
            )
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a mapping, the path of a JSON file or None, but is {describe(config)}.")
    plain: dict[str, Any] = _plain(config)
    return plain


def arguments_of(trainer: BaseTrainer) -> dict[str, Any]:
    """The arguments of the trainer as plain values. Arguments that were None have the value from the launch."""
    return {name: _plain(getattr(trainer, name)) for name in _ARGUMENTS}


def launch_of(trainer: BaseTrainer) -> dict[str, Any]:
    """World size, strategy, device and versions of the run."""
    return {
        "world_size": trainer.accelerator.num_processes,
        "strategy": trainer.accelerator.distributed_type.value,
        "device": trainer.device.type,
        "versions": library_versions(),
    }


def flat_config(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A config in the form that every tracker accepts: keys joined with "/", lists as JSON, None as "None"."""
    flat = {"/".join(path): value for path, value in flatten_nested_dict(config).items()}
    return {
        name: value
        if isinstance(value, bool | int | float | str)
        else json.dumps(value)
        if isinstance(value, list)
        else str(value)
        for name, value in flat.items()
    }


def _plain(value: Any) -> Any:
    """Nested dicts with string keys, lists, numbers, strings, bools and None. Other values become their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


# ---------------------------------------------------------------------- failures


def on_rank_zero(work: Callable[[], T], failure: str) -> T:
    """Run `work` on rank 0, and return its result on all ranks. Call on every rank.

    Args:
        work: Returns a small value.
        failure: Start of the error message if `work` raised.

    Raises:
        TrainingError: On every rank, if `work` raised on rank 0. Otherwise the other ranks would wait for rank 0.
    """
    error: Exception | None = None
    told, result = "", None
    if collectives.rank() == 0:
        try:
            result = work()
        except Exception as ex:
            error, told = ex, f"{failure}: {type(ex).__name__}: {ex}"
    told, result = collectives.broadcast_object((told, result))
    if told:
        raise TrainingError(told) from error
    return result  # type: ignore[return-value]


class Guard:
    """Keeps failures of a tracker away from training. Logs when an outage begins and when it ends.

    After a failure, `work` is tried again at the next call, but failing attempts take at most a tenth of the run's
    time. This matters because some clients block for minutes while their server is away.

    Args:
        name: Name of the tracker in messages.
        remedy: What happens to the data in the meantime, as a sentence.
    """

    def __init__(self, name: str, remedy: str) -> None:
        self.name = name
        self.remedy = remedy
        self.error: Exception | None = None
        """The exception of the last attempt. None: it succeeded."""
        self._not_before = 0.0

    def attempt(self, trainer: BaseTrainer, work: Callable[[], Any], at_once: bool = False) -> bool:
        """Run `work`, unless it is too early after a failure. Return whether it ran and did not raise.

        Args:
            trainer: The trainer, for its logger.
            work: The function that may fail.
            at_once: Run even if it is too early.
        """
        start = time.monotonic()
        if self.error is not None and not at_once and start < self._not_before:
            return False
        try:
            work()
        except Exception as ex:
            if self.error is None:
                trainer.logger.error(
                    f"Step {trainer.step}: {self.name} failed. Training continues. {self.remedy}"
                    f" {type(ex).__name__}: {ex}"
                )
            self.error = ex
            end = time.monotonic()
            self._not_before = end + (end - start) / _MAX_SHARE
            return False
        if self.error is not None:
            trainer.logger.info(f"Step {trainer.step}: {self.name} works again.")
            self.error = None
        return True
