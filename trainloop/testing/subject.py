"""The trainer in `trainloop prove`: the user's own, for a few steps, with checkpoints where the proof needs them."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import find_batch_size

from ..data.checksums import sample_checksum
from ..hook import BaseHook
from ..hooks.checkpointing import CheckpointingHook
from ..hooks.evaluation import EvaluationHook
from ..hooks.save_timing import SaveTiming
from ..hooks.trackers import TrackerHook
from ..hooks.wandb import WandbHook
from ..trainer import BaseTrainer
from .witness import UnfitError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SEED = 0


@dataclass(frozen=True)
class Subject:
    """Makes the trainer in the processes of a life.

    The trainer gets `steps` steps, and checkpoints every `interval` steps. Hooks that send numbers to trackers are left
    out. So are evaluations before the first and after the last step, which may take hours.
    """

    name: str
    """"module:function" or "path/to/file.py:function"; the function takes the workspace. Or a trainer class."""
    steps: int
    interval: int
    accumulate: int = 1
    """Factor for the micro-batches a step, so that one process can train on the data of several."""
    is_async: bool | None = False
    """Whether saves are async. None: as in the trainer."""

    def __call__(self, workspace: Path) -> BaseTrainer:
        """Make the trainer."""
        made: Any = find_function(self.name)
        trainer: Any
        if isinstance(made, type) and issubclass(made, BaseTrainer):
            trainer = made(max_steps=self.steps, workspace=workspace, seed=_SEED)
        else:
            trainer = made(workspace)
        if not isinstance(trainer, BaseTrainer):
            raise UnfitError(f"{self.name} must return a trainer, but returned {type(trainer).__name__}.")
        trainer = cast("Any", trainer)  # because the next lines set methods
        trainer.max_steps, trainer.max_epochs, trainer.workspace = self.steps, None, workspace
        trainer.seed = trainer._asked_seed = _SEED if trainer.seed is None else trainer.seed
        trainer.gradient_accumulation_steps *= self.accumulate
        build_hooks, measuring = trainer.build_hooks, Measuring(workspace)
        trainer.build_hooks = lambda: [*self._hooks(build_hooks()), measuring]
        trainer.forward = measuring.watched(trainer.forward)
        return trainer  # type: ignore[no-any-return]

    def _hooks(self, given: Sequence[BaseHook]) -> list[BaseHook]:
        hooks = [hook for hook in given if not isinstance(hook, TrackerHook | WandbHook)]
        for hook in hooks:
            if isinstance(hook, EvaluationHook):
                hook.at_start = hook.at_end = False
        checkpointing = [hook for hook in hooks if isinstance(hook, CheckpointingHook)]
        if not checkpointing:
            hooks.append(CheckpointingHook(self.interval))
        for saving in checkpointing:
            saving.interval, saving.timing = self.interval, SaveTiming(None, None)
            saving.async_save = saving.async_save if self.is_async is None else self.is_async
        return hooks


class Measuring(BaseHook):
    """Measures a life from inside, and writes the measurements when the run has reached its end.

    Args:
        workspace: The run's workspace. The files are beside it, one per rank.
    """

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self._steps: dict[int, Any] = {}
        self._num_samples = 0
        self._draws = False

    def watched(self, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap `forward`, to count its samples and to see whether it draws random numbers."""

        def watched(batch: Any) -> Any:
            self._num_samples += find_batch_size(batch) or 0
            before = _generators()
            result = forward(batch)
            self._draws = self._draws or any(not torch.equal(a, b) for a, b in zip(before, _generators(), strict=True))
            return result

        return watched

    def on_before_step(self, trainer: BaseTrainer) -> None:
        self._num_samples = 0

    def on_after_step(self, trainer: BaseTrainer) -> None:
        info = trainer.step_info
        self._steps[trainer.step] = {
            "loss": float(info.loss),
            "grad_norm": info.grad_norm,
            "lr": [float(rate) for rate in info.lr],
            "samples": self._num_samples,
            "seconds": info.step_time,
        }

    def on_after_train(self, trainer: BaseTrainer) -> None:
        import resource  # POSIX has it, and a proof needs POSIX anyway

        unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of `ru_maxrss`
        measured = {
            "steps": self._steps,
            "draws": self._draws,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "device_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "device": trainer.device.type,
            "precision": trainer.accelerator.mixed_precision,
        }
        measured_file(self.workspace, trainer.accelerator.process_index).write_text(json.dumps(measured))


def measured_file(workspace: Path, rank: int) -> Path:
    """The file with a rank's measurements."""
    return workspace.parent / f"{workspace.name}.measured.rank{rank}.json"


def batch_checksum(batch: Any) -> int:
    """The record of a micro-batch, by which it is compared."""
    return sample_checksum([batch])


def _generators() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def find_function(name: str) -> Callable[..., Any]:
    """Import the function or class with this name.

    Raises:
        ValueError: There is no such function, or it doesn't take the workspace.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ValueError(f"the trainer must be named as module:function or path/to/file.py:function, but is {name!r}")
    if place.endswith(".py"):
        path = Path(place).resolve()
        folder, place = str(path.parent), path.stem
        if not path.is_file():
            raise ValueError(f"{path} is not there")
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(place), function)
    except (ImportError, AttributeError) as ex:
        raise ValueError(f"{name} cannot be imported: {ex}") from ex
    if not callable(found):
        raise ValueError(f"{name} must be a function that makes a trainer for a workspace, or a class of trainer")
    if not inspect.isclass(found) and not inspect.signature(found).parameters:
        raise ValueError(f"{name} must take the workspace, as `def {function}(workspace): ...`")
    return found  # type: ignore[no-any-return]
