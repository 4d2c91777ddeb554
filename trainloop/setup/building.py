"""Builds a run: calls the factories in order, checks their results, and prepares these with Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed

from ..data.first_batches import keep_first_batches
from ..hook import AveragingHook
from ..ranks import collectives
from ..step.agreement import Agreement
from ..step.built import BuiltModel
from ..step.gradients import Gradients
from ..step.optimizers import Optimizers
from ..step.phases import check_phases
from ..step.run_length import RunLength
from ..step.window import Window
from . import factories
from .frozen_helpers import build_frozen, check_frozen
from .initial_weights import InitialWeights
from .preparing import prepare, shard_without_values
from .report import announce
from .trainable import Trainable

if TYPE_CHECKING:
    from ..trainer import BaseTrainer


def build(trainer: BaseTrainer) -> None:
    """Build everything that a trainer needs for its steps. Call once, on every rank."""
    trainer.peers.enter("building the run")
    accelerator = trainer.accelerator
    if trainer.seed is None:
        trainer.seed = collectives.broadcast_object(int(torch.randint(2**31, ())))
    set_seed(trainer.seed)
    trainer.data_loader = trainer.build_data_loader()
    if trainer.overfit_batches is not None:
        has_seed = trainer._asked_seed is not None
        trainer.data_loader = keep_first_batches(trainer.data_loader, trainer.overfit_batches, has_seed)
    trainer._feed = factories.data_feed(trainer.data_loader, trainer.seed, accelerator)
    if trainer.overfit_batches is not None:
        trainer._feed.repeat_first(trainer.overfit_batches)
    trainer._length = RunLength(trainer, trainer._feed)
    trainer.eval_data_loader = trainer.build_eval_data_loader()
    set_seed(trainer.seed)
    trainer.frozen = build_frozen(trainer)
    set_seed(trainer.seed)  # so the model doesn't depend on random numbers drawn for data and frozen modules
    trainer.model = factories.check_model(trainer.build_model())
    check_frozen(trainer.model, trainer.frozen)
    trainer._initial_weights = InitialWeights(trainer)
    sharded = None
    if trainer._initial_weights.is_on_meta:
        if accelerator.is_fsdp2:
            sharded = shard_without_values(trainer, trainer.model)
            trainer.model = sharded.model
        trainer._initial_weights.allocate()
    trainer.optimizer = factories.check_optimizer(trainer.build_optimizer())
    trainer.lr_scheduler, trainer.lr_monitor = factories.check_lr_scheduler(
        trainer.build_lr_scheduler(), trainer.optimizer
    )
    trainer.grad_scaler = factories.choose_grad_scaler(accelerator, trainer.build_grad_scaler())
    trainer.model, trainer.optimizer = prepare(trainer, trainer.model, trainer.optimizer, sharded)
    trainer._raw_optimizer = factories.raw_optimizer(trainer.optimizer)
    if isinstance(trainer._raw_optimizer, Optimizers):
        trainer.optimizer = trainer._raw_optimizer  # Accelerate's wrapper is not a mapping
    factories.check_optimizer_params(trainer._raw_optimizer, trainer.model)
    hooks = factories.check_hooks(trainer.build_hooks(), trainer.workspace, trainer.lr_monitor)
    trainer.hooks, trainer.checkpointers = hooks
    trainer.averagers = [hook for hook in trainer.hooks if isinstance(hook, AveragingHook)]
    trainer._initial_weights.fill_what_stays()
    set_seed(trainer.seed, device_specific=True)  # from here on each rank draws different random numbers
    check_phases(trainer)
    clip = None if isinstance(trainer.grad_clip, Mapping) else trainer.grad_clip
    trainer._gradients = Gradients(trainer.model.parameters(), clip, trainer.grad_scaler, trainer._raw_optimizer)
    trainer._window = Window(trainer, trainer._feed)
    trainer._agreement = Agreement(trainer, trainer._feed)
    sums_frozen = any(hook.trainable_only for hook in trainer.checkpointers)
    trainer._built_model = BuiltModel.of(trainer.unwrapped_model, sums_frozen=sums_frozen)
    trainer._trainable = Trainable(trainer)
    trainer._is_built = True
    if trainer.timeout is not None:
        collectives.set_timeout(trainer.timeout, trainer.model)
    announce(trainer)
