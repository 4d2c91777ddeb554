"""`dry_run=True`: a short run that shows that everything works, and leaves nothing behind."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import CheckpointStore
from .checkpoint.tools.report import size
from .errors import TrainingError
from .hook import BaseHook
from .ranks import collectives
from .records import flatten_nested_dict, is_number
from .state.training import resume
from .step.built import sums_of_held

if TYPE_CHECKING:
    from .trainer import BaseTrainer

NUM_STEPS = 3
MAX_EVAL_BATCHES = 3
"""Batches of an evaluation per rank."""


class _Rehearsal(BaseHook):
    """The last hook of a dry run. It ends the run after a few steps, and records their times."""

    def __init__(self) -> None:
        self.first_step = 0
        self.seconds: list[float] = []

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self.first_step = trainer.step
        trainer._length.stops_after = trainer.step + NUM_STEPS

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.seconds.append(trainer.step_info.step_time)


def rehearse(trainer: BaseTrainer) -> None:
    """Do a dry run: three steps, one evaluation, one save and one load into a scratch folder. Call on every rank.

    The scratch folder is on the same disk as the workspace, and is removed at the end. During the dry run,
    `trainer.workspace` is a folder in it.

    Raises:
        TrainingError: The loaded state differs from the saved one; or as `BaseTrainer.train`.
    """
    if trainer._is_built:
        trainer.logger.info("The dry run is over. Set `dry_run=False` to train.")
        return
    workspace = trainer.workspace
    trainer.scratch = _make_scratch(workspace)
    trainer.workspace = None if workspace is None else trainer.scratch / "workspace"
    rehearsal = _Rehearsal()
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    try:
        trainer._build()
        trainer.hooks.append(rehearsal)
        trainer._run()
        lines = [_steps(trainer, rehearsal), _evaluation(trainer), *_checkpoints(trainer), _memory(trainer)]
        for line in filter(None, lines):
            trainer.logger.info(f"Dry run: {line}")
        trainer.logger.info("Dry run: everything works. The workspace was not touched.")
    finally:
        scratch, trainer.workspace, trainer.scratch = trainer.scratch, workspace, None
        if collectives.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def limit_of_evaluation(trainer: BaseTrainer, limit: int | None) -> int | None:
    """Limit of batches of an evaluation, over all ranks: `limit`, or less in a dry run. None: all batches."""
    if not trainer.dry_run:
        return limit
    most = MAX_EVAL_BATCHES * collectives.world_size()
    return most if limit is None else min(limit, most)


def _make_scratch(workspace: Path | None) -> Path:
    """Make the scratch folder: outside of the workspace, on the same disk. Call on every rank; all get the same one."""
    made = ""
    if collectives.rank() == 0:
        beside = None if workspace is None else next(path for path in workspace.parents if path.is_dir())
        made = tempfile.mkdtemp(prefix=".dry-run-", dir=beside)
    return Path(collectives.broadcast_object(made))


def _steps(trainer: BaseTrainer, rehearsal: _Rehearsal) -> str:
    seconds = ", ".join(f"{value:.3g}" for value in rehearsal.seconds)
    return f"steps {rehearsal.first_step + 1} to {trainer.step} took {seconds} s; the last loss is {_loss(trainer)}."


def _loss(trainer: BaseTrainer) -> str:
    return f"{float(trainer.step_info.loss):.4g}" if trainer.step_info.losses else "not known"


def _evaluation(trainer: BaseTrainer) -> str:
    """Evaluate, unless a hook has done it. Returns a line for the log."""
    if trainer.eval_data_loader is None or any(getattr(hook, "evaluates", False) for hook in trainer.hooks):
        return ""
    flat = flatten_nested_dict(trainer.evaluate(limit_batches=limit_of_evaluation(trainer, None)))
    found = [f"{'/'.join(map(str, key))} {value:.4g}" for key, value in flat.items() if is_number(value)]
    return f"the evaluation found {', '.join(found) or 'no numbers'}."


def _checkpoints(trainer: BaseTrainer) -> list[str]:
    """Load the checkpoint of each checkpointer into the trainer, and compare."""
    lines = []
    for checkpointer in trainer.checkpointers:
        folder = checkpointer.saves_to(trainer)
        checkpoint = None
        if folder is not None:
            checkpoint = CheckpointStore(folder, logger=trainer.logger).resolve("latest")
        if checkpoint is None:
            lines.append(f"{type(checkpointer).__name__} has saved no checkpoint.")
            continue
        before = sums_of_held(trainer.live_model_state())
        start = time.perf_counter()
        state = resume(trainer, checkpoint, ())
        for hook in trainer.hooks:
            hook.on_load_state_dict(trainer, state)
        seconds = time.perf_counter() - start
        after = sums_of_held(trainer.live_model_state())
        changed = sorted({name for names in collectives.gather_objects(_differing(before, after)) for name in names})
        if changed:
            raise TrainingError(
                f"The dry run has loaded other values than it had saved, of {len(changed)} tensors (first:"
                f" {changed[0]})."
            )
        num_bytes = sum(file.stat().st_size for file in checkpoint.folder.rglob("*") if file.is_file())
        lines.append(f"saved {size(num_bytes)}, loaded it in {seconds:.3g} s, and got the same values.")
    return lines


def _differing(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [name for name, value in after.items() if value != before[name]]


def _memory(trainer: BaseTrainer) -> str:
    """The highest peak memory of any rank, as a line for the log."""
    own = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of `ru_maxrss`
        own["a process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if trainer.device.type == "cuda":
        own["a device"] = torch.cuda.max_memory_allocated(trainer.device)
    peaks = collectives.gather_objects(own)
    highest = {name: max((peak[name], rank) for rank, peak in enumerate(peaks)) for name in own}
    told = [f"{size(num_bytes)} of {name} (rank {rank})" for name, (num_bytes, rank) in highest.items()]
    return f"peak memory: {', '.join(told)}." if told else ""
