"""One pass over held-out data. Every sample counts once over all ranks, and the training run doesn't change.

batch i ─► rank i mod world size ─► eval_forward ─► weighted sums on the device ─► one read ─► sums over the ranks

In: the built trainer, held-out data, and the reduction of each record.
Out: nested numbers, the same on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import find_batch_size
from torch import nn

from ..errors import check_int, describe
from ..ranks import collectives
from ..ranks.samples import padding
from ..records import check_output, check_records, unflatten_nested_dict
from ..rng import load_rng_state, rng_state
from ..step.buffers import share_rank_zero_buffers
from ..step.loss_weights import host_weight
from ..terminal import Bar
from .batches import EvaluationBatches, Round, seed_for
from .collected import CollectedRecords
from .guard import guarded
from .huggingface import EvaluateModules
from .totals import REDUCTIONS, Metrics, Reduce, Totals

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_QUIET_SECONDS = 0.5  # an evaluation that takes longer shows a bar


def evaluate(
    trainer: BaseTrainer,
    data: Any,
    reduce: Mapping[str, Reduce],
    start_asking: Callable[[], Callable[[], bool]] = lambda: _goes_on,
    limit_batches: int | None = None,
) -> dict[str, Any] | None:
    """Run `eval_forward` over a loader, or over each loader of a mapping. Call on every rank, between steps.

    Args:
        trainer: The trainer. It must be built.
        data: An iterable of batches, or a mapping from names to iterables.
        reduce: How a record is reduced over batches and ranks, by its name ("a/b"). Other records are averaged.
        start_asking: Called before each round, on every rank. It returns a function that says after the round whether
            to stop, the same on every rank.
        limit_batches: Limit of batches for each data set, over all ranks together. None: all batches.

    Returns:
        The metrics that `finish_evaluation` returned, the same on every rank; for a mapping, by the names of the
        loaders. None: `start_asking` stopped it.
    """
    check_int("limit_batches", limit_batches, 1, optional=True)
    for name, how in reduce.items():
        if how not in REDUCTIONS:
            raise ValueError(f"`reduce` must name one of {REDUCTIONS} for each record, but has {how!r} for {name!r}.")
    with trainer.peers.doing("an evaluation"), _timed(trainer), untouched(trainer), torch.no_grad():
        if not isinstance(data, Mapping):
            return _evaluate_one(trainer, data, reduce, start_asking, limit_batches)
        results: dict[str, Any] = {}
        for name, loader in data.items():
            result = _evaluate_one(trainer, loader, reduce, start_asking, limit_batches)
            if result is None:
                return None
            results[name] = result
        return results


def _goes_on() -> bool:
    return False


@contextmanager
def _timed(trainer: BaseTrainer) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        trainer.step_info.evaluation_time += time.perf_counter() - start


def _evaluate_one(
    trainer: BaseTrainer,
    loader: Any,
    reduce: Mapping[str, Reduce],
    start_asking: Callable[[], Callable[[], bool]],
    limit_batches: int | None,
) -> dict[str, Any] | None:
    totals, metrics, modules, collected = Totals(reduce), Metrics(), EvaluateModules(), CollectedRecords()
    try:
        for one in rounds(trainer, loader, "evaluation", limit_batches):
            should_stop = start_asking()  # the ranks exchange their answers during the round
            with metrics.muted(not one.is_counted), modules.muted(not one.is_counted), alone(trainer, one):
                loss, records = check_output(trainer.eval_forward(one.batch), "eval_forward")
            numbers = metrics.split(records, one.is_counted)
            numbers = modules.split(numbers, one.index, one.is_counted)
            numbers = collected.split(numbers, one.index, one.is_counted)
            if one.index < collectives.world_size():
                check_records(numbers)
            if one.num_samples is not None:
                if loss is not None:
                    numbers = {**numbers, "loss": loss}
                totals.add(numbers, _weight(trainer, one.batch, one.num_samples))
            if should_stop():
                return None
        found = {**totals.result(), **metrics.result(), **modules.result(), **collected.result()}
        return _finished(trainer, unflatten_nested_dict(found))
    finally:
        metrics.reset()
        modules.reset()


def _finished(trainer: BaseTrainer, metrics: dict[str, Any]) -> dict[str, Any]:
    finished = trainer.finish_evaluation(metrics)
    if not isinstance(finished, Mapping):
        raise TypeError(f"`finish_evaluation` must return a mapping of metrics, but returned {describe(finished)}.")
    return dict(finished)


def rounds(
    trainer: BaseTrainer, loader: Any, title: str, limit_batches: int | None, *, keeps_order: bool = False
) -> Iterator[Round]:
    """The rounds of one pass, with a bar on rank 0 if it takes long. The random generators are seeded before each
    round, so that the noise is the same at every evaluation. Iterate on every rank, inside `untouched`.
    """
    assert trainer.seed is not None, "the trainer is built"
    batches = EvaluationBatches(loader, trainer.seed, trainer.device, limit_batches, keeps_order=keeps_order)
    is_shown = trainer.accelerator.is_main_process
    with Bar(title, batches.num_rounds, "batch", delay=_QUIET_SECONDS, is_drawn=is_shown) as bar:
        for one in batches:
            seed_for(trainer.device, trainer.seed, "forward", one.index)
            yield one
            bar.update()


@contextmanager
def alone(trainer: BaseTrainer, one: Round) -> Iterator[None]:
    """The context for the user's code in a round. A batch that doesn't count is hidden from gathers of other ranks."""
    with padding(not one.is_counted), guarded(trainer.model, one.gap):
        yield


def _weight(trainer: BaseTrainer, batch: Any, num_samples: int) -> Any:
    weight = trainer.batch_weight(batch)
    if weight is not None:
        if isinstance(weight, torch.Tensor) and weight.device.type != "cpu":
            return weight.detach().reshape(())
        number = host_weight(weight)
        if number is None or number != number:
            raise ValueError(f"`batch_weight` must return a finite number >= 0, but returned {describe(weight)}.")
        return number
    if num_samples >= 0:
        return num_samples
    try:
        return find_batch_size(batch)
    except (TypeError, ValueError, IndexError) as ex:
        raise ValueError(
            "How many samples a batch of the evaluation data has cannot be told: it does not begin with a tensor. Let"
            " `batch_weight` return the number."
        ) from ex


# ---------------------------------------------------------------------- the training run, untouched


@contextmanager
def untouched(trainer: BaseTrainer) -> Iterator[None]:
    """The context of an evaluation: the model is in eval mode, with rank 0's buffers (those in a checkpoint). At its
    end, modes, buffers and random generators are restored.
    """
    model, device = trainer.model, trainer.device
    with ExitStack() as stack:
        stack.callback(load_rng_state, rng_state(device), device)
        stack.callback(_set_modes, [(module, module.training) for module in model.modules()])
        stack.callback(collectives.reshard, model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # After a forward pass without gradients, DDP would not share its buffers in the next one.
            stack.callback(setattr, model, "require_forward_param_sync", model.require_forward_param_sync)
        stack.enter_context(trainer._window.buffers.fork(trainer.unwrapped_model).kept())
        share_rank_zero_buffers(trainer.unwrapped_model)
        model.eval()
        stack.enter_context(trainer._window.modes.averaged())
        yield


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode
