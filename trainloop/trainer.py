"""The training loop: build -> prepare -> restore -> step after step.

    train ─► _run_step ─► window.run        N x (batch ─► forward ─► backward)
                          norm              the step reads one number back from the device; it is the same on every rank
                       ─► finite: clip ─► update ─► learning rate
                          not finite: window.discard, and a new window

Accelerate owns devices, wrapping, mixed precision and the grad scaler. This file owns the order of things. All ranks
take the same decisions: they decide by the gradient norm and by the control message, which they exchange once a window.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import KwargsHandler
from torch import nn

from .data.feed import DataFeed
from .errors import check_initialised
from .evaluation.methods import Evaluating
from .hook import AveragingHook, BaseHook, CheckpointerHook
from .logged import Logging
from .paths import parse_absolute_path
from .ranks.control import Control
from .ranks.ctrl_c import exit_if_asked, gentle_ctrl_c
from .ranks.failure import reported_failure
from .ranks.peers import IN_WINDOW, Peers
from .recipe import Recipe
from .rehearsal import rehearse
from .setup import arguments, factories, launch
from .setup.building import build
from .setup.initial_weights import InitialWeights
from .setup.trainable import Trainable
from .state.live import model_state, unwrap
from .state.training import load_whole_state, restore_run, run_state, start_data
from .step.agreement import Agreement
from .step.built import BuiltModel
from .step.garbage import GarbageCollection
from .step.gradients import Gradients
from .step.info import StepInfo
from .step.non_finite import clean_name
from .step.phases import Phase, Phases
from .step.run_length import RunLength
from .step.update import Update
from .step.window import Window

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class BaseTrainer(Evaluating, Logging, Recipe):
    """Trains a model. Subclass it, write the `build_*` factories and `forward`, and call `train`.

    The same script runs under any `accelerate launch` configuration. One step is one applied optimizer update. Its
    gradient comes from exactly `gradient_accumulation_steps` micro-batches on each process.

    Args:
        max_steps: Number of optimizer steps, including those before a resume. None: only `max_epochs` ends the run.
        grad_clip: Limit of the gradient's 2-norm. None: the norm is measured, but nothing is clipped. With `phases`,
            this is the limit of each phase, or a mapping from phase names to limits.
        max_non_finite_grad_retries: How often a step with a non-finite gradient is tried again with new data before
            `NonFiniteGradientError` is raised. None: until a whole epoch gave no finite gradient (100 windows if the
            data has no epochs). 0: raise at once. An overflow that only needs a lower loss scale doesn't count.
        mixed_precision: "no", "fp16" or "bf16". None: the choice of `accelerate launch`.
        gradient_accumulation_steps: Micro-batches a step. None: the value of the launch, else 1.
        workspace: Folder that hooks write to. A relative path is resolved when the trainer is constructed.
        device: "cpu" forces the CPU. None: Accelerate chooses.
        no_sync_accumulate: False: reduce gradients at each micro-batch: less memory (FSDP2), more communication.
        state_dict_options: Options for `state_dict` and `load_state_dict`.
        logger: None: the logger "trainloop", on rank 0; it gets a handler if logging is not configured.
        accelerator: An accelerator that the script already has. None: `build_accelerator` makes one.
        seed: In [0, 2^31). It determines the initial model (the same on all ranks), the order of the data, and each
            rank's random generators. None: rank 0 draws it from torch's global generator.
        timeout: How long a collective waits for a rank that hangs, as a timedelta or in seconds. A rank that dies is
            noticed at once. None: Accelerate's default, 10 minutes with NCCL and 30 with gloo.
        deterministic: True: give bit-for-bit identical results on a GPU, at some cost in speed; an operation that
            cannot do so raises. False: switch this off. Both act on the whole process. None: keep torch's settings.
        gc_interval: Steps between Python's garbage collections, on all ranks at once. None: Python decides.
        max_epochs: Total passes over the data. The run ends after the step whose window reaches the end of the last
            pass, or at `max_steps` if that comes first.
        dry_run: `train` takes three steps, evaluates once on a few batches, saves and loads once in a scratch folder,
            logs the peak memory, and ends. Hooks only say what they would log. The workspace is not touched.
        overfit_batches: Train only on this many first batches, counted as one process draws them, in the same order
            in each epoch. A correct model learns them by heart.
        kwargs_handlers: Accelerate's options, for example `DistributedDataParallelKwargs(find_unused_parameters=True)`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or contradicts the launch configuration.

    Example:
        ```python
        import torch
        from torch import nn
        from trainloop import BaseTrainer, ProgressHook

        class Linear(BaseTrainer):
            def build_data_loader(self):
                x = torch.randn(512, 4)
                data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
                return torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)

            def build_model(self):
                return nn.Linear(4, 1)

            def build_optimizer(self):
                return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

            def build_hooks(self):
                return [ProgressHook(interval=100)]

            def forward(self, batch):
                x, y = batch
                loss = nn.functional.mse_loss(self.model(x), y)
                return loss, {"mse": loss.detach()}

        Linear(max_steps=300, grad_clip=1.0, seed=0).train()
        ```
    """

    # What the user gave.
    max_steps: int | None
    """The last step. If only `max_epochs` is given, it is set when the data is built. None: the data has no length."""
    max_epochs: int | None
    grad_clip: float | Mapping[str, float | None] | None
    max_non_finite_grad_retries: int | None
    mixed_precision: str | None
    gradient_accumulation_steps: int
    workspace: Path | None
    """The absolute path of the folder that hooks write to."""
    no_sync_accumulate: bool
    state_dict_options: StateDictOptions | None
    logger: logging.Logger
    seed: int | None
    timeout: timedelta | None
    deterministic: bool | None
    gc_interval: int | None
    dry_run: bool
    """Whether this is a dry run. Then your own hooks must not write outside of `workspace`."""
    overfit_batches: int | None

    # What was built.
    accelerator: Accelerator
    """Accelerate's object for this run."""
    data_loader: Iterable[Any]
    eval_data_loader: Any
    model: nn.Module
    """The model as Accelerate prepared it: wrapped, on the device."""
    optimizer: Optimizer
    """The optimizer as Accelerate prepared it."""
    lr_scheduler: LRScheduler | None
    """The schedule that `build_lr_scheduler` returned."""
    lr_monitor: str | None  # the metric that moves the schedule after each evaluation; None: each update moves it
    grad_scaler: torch.amp.GradScaler | None
    """The grad scaler in use: Accelerate's own or that of `build_grad_scaler`. None: there is none."""
    hooks: list[BaseHook]
    checkpointers: list[CheckpointerHook]  # the hooks that save the run
    averagers: list[AveragingHook]  # the hooks that average the weights

    # The state of the run.
    step: int
    """Number of the optimizer step that began last, from 1. An exception before the update takes the step back."""
    phase: str | None  # the phase that is running, if the step has `phases`
    epoch: int
    """Number of completed epochs. During a step: the epoch in which its window began, from 0."""
    steps_per_epoch: int | None
    """Steps in an epoch, rounded up. It is set when the data is built. None: the data has no length."""
    step_info: StepInfo
    """What this step has measured so far."""
    control: Control  # what hooks ask of all ranks, and what the ranks agreed on
    peers: Peers  # what the other ranks are doing, for the error if one is gone

    # Internal.
    scratch: Path | None  # the scratch folder of a dry run
    settings: dict[str, Any]  # the settings in force, by flat name; the checkpoints record them
    _asked_seed: int | None
    _forces_cpu: bool
    _kwargs_handlers: list[KwargsHandler]
    _raw_optimizer: Optimizer
    _feed: DataFeed
    _length: RunLength
    _gradients: Gradients
    _update: Update
    _phases: Phases
    _trainable: Trainable
    _window: Window
    _agreement: Agreement
    _built_model: BuiltModel
    _initial_weights: InitialWeights
    _is_built: bool
    _is_restored: bool
    _unheard: set[str]
    _restored_rng: dict[str, Any] | None

    def __init__(
        self,
        max_steps: int | None = None,
        grad_clip: float | Mapping[str, float | None] | None = None,
        max_non_finite_grad_retries: int | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        workspace: Path | str | None = None,
        device: torch.device | str | int | None = None,
        no_sync_accumulate: bool = True,
        state_dict_options: StateDictOptions | None = None,
        logger: logging.Logger | None = None,
        *,
        accelerator: Accelerator | None = None,
        seed: int | None = None,
        timeout: timedelta | float | None = None,
        kwargs_handlers: Sequence[KwargsHandler] = (),
        deterministic: bool | None = None,
        gc_interval: int | None = 1000,
        max_epochs: int | None = None,
        dry_run: bool = False,
        overfit_batches: int | None = None,
    ) -> None:
        self.max_steps, self.max_epochs, self.grad_clip = max_steps, max_epochs, grad_clip
        self.max_non_finite_grad_retries, self.mixed_precision = max_non_finite_grad_retries, mixed_precision
        self.workspace = parse_absolute_path("workspace", workspace) if workspace is not None else None
        self.no_sync_accumulate, self.state_dict_options = no_sync_accumulate, state_dict_options
        self.seed, self._asked_seed, self.deterministic, self.gc_interval = seed, seed, deterministic, gc_interval
        self.timeout, self._kwargs_handlers = arguments.parse_timeout(timeout), list(kwargs_handlers)
        self.dry_run, self.overfit_batches, self.scratch = dry_run, overfit_batches, None
        arguments.check_arguments(self, BaseTrainer, accelerator, gradient_accumulation_steps)
        self.mixed_precision = launch.resolve_mixed_precision(mixed_precision)
        launch.choose_accelerator(self, accelerator, gradient_accumulation_steps, device, BaseTrainer)
        self.logger = logger if logger is not None else factories.default_logger()
        self.hooks, self.checkpointers, self.averagers, self.settings = [], [], [], {}
        self.step, self.step_info, self.control, self.peers = 0, StepInfo(), Control(), Peers()
        self.phase, self.epoch, self.steps_per_epoch = None, 0, None
        self._is_built, self._is_restored, self._restored_rng, self._unheard = False, False, None, set()

    def build_accelerator(self) -> Accelerator:
        """Make the `Accelerator`. The constructor calls it: set what an override needs before `super().__init__`."""
        return launch.default_accelerator(self)

    # ------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run until `max_steps`, `max_epochs` or an agreed stop. Call on every rank.

        You may raise the limit and call it again. The run then continues where it stopped.

        The first Ctrl-C ends the run after its step: it is saved, and `SystemExit` is raised. The second one raises
        `KeyboardInterrupt` at once, and so does the first one in a notebook.

        Raises:
            NonFiniteGradientError: See `max_non_finite_grad_retries`.
            RankDisagreementError: `forward` skipped micro-batches on some ranks only, or the models have diverged.
            TrainingError: A whole epoch gave no loss. Or a rank is gone or hangs; the message names it.
        """
        check_initialised(self, ["_is_built"], "BaseTrainer")
        rehearse(self) if self.dry_run else self._run()

    def _run(self) -> None:
        with reported_failure(self), gentle_ctrl_c(self):
            self._build()
            restore_run(self)
            with self._feed, factories.accumulation_state(self), GarbageCollection(self.gc_interval) as garbage:
                self._begin()
                while not self.is_finished:
                    self._run_step()
                    self.peers.enter("saving a checkpoint")
                    for checkpointer in self.checkpointers:  # after all hooks, so that their order doesn't matter
                        checkpointer.save_if_due(self)
                    exit_if_asked(self)
                    garbage.collect_if_due(self.step)
                self._agreement.check()
            self._window.modes.end()
            for hook in self.hooks:
                hook.on_after_train(self)

    def _run_step(self) -> None:
        self.step_info = StepInfo()
        self._window.begin_step()
        try:
            self.peers.enter("hooks")
            for hook in self.hooks:
                hook.on_before_step(self)
            self._trainable.take_effect()
            start = time.perf_counter()
            for phase in self._phases.of_step():  # usually one; a GAN has several
                with phase:
                    self._run_phase(phase)
        except BaseException:
            self._window.take_back()
            raise
        for averager in self.averagers:  # after all hooks, so that their order doesn't matter
            averager.update_average(self)
        self._window.is_in_step = False
        self.step_info.step_time = time.perf_counter() - start
        self.peers.enter("hooks")
        for hook in self.hooks:
            hook.on_after_step(self)
        self._trainable.take_effect()

    def _run_phase(self, phase: Phase) -> None:
        while not self._run_window():
            if self._window.discard():
                for hook in self.hooks:
                    hook.on_non_finite_grad(self, self.step_info.non_finite_grad_retry_count)
        for hook in self.hooks:
            hook.on_before_optimizer_step(self)
        self._update.finish()
        self._gradients.drop()
        phase.finish()
        for hook in self.hooks:
            hook.on_after_optimizer_step(self)

    def _run_window(self) -> bool:
        """Run one window and clip its gradient. Return whether the gradient can be applied."""
        self.peers.enter(IN_WINDOW)
        self._window.run()
        self.control.start(self._window.skipped, self._agreement.checksum(), self._feed.num_epochs_done)
        norm = self._gradients.norm()
        self.peers.enter("waiting for the other ranks' messages")
        self.control.finish(self.step, self._agreement.explain)  # before the sync, which may wait for a dead rank
        self._window.tell_bad_samples()
        self.step_info.grad_norm = self._update.start(norm)  # the step's one device-to-host sync
        return self._window.can_be_applied()

    # ------------------------------------------------------------------ build, restore

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.accelerator.device  # type: ignore[no-any-return]  # Accelerate ships no types

    def _build(self) -> None:
        """Build everything, once. A later `train` uses it again."""
        check_initialised(self, ["_is_built"], "BaseTrainer")
        if not self._is_built:
            build(self)

    def _begin(self) -> None:
        self._window.check_whole()
        start_data(self)
        self._window.modes.begin()
        self._gradients.drop()
        self._phases = Phases(self)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the run. Call on every rank, between steps.

        Returns:
            `"model"`: tensors by parameter name. `"training_state"`: step, seed, optimizer, lr_scheduler, grad_scaler
            and data position, the same on every rank. `"rank"`: random generators and other state of this rank only.
            The hooks add their own keys. Tensors are the live ones, unless `state_dict_options` says otherwise.
        """
        return run_state(self, self.live_model_state(self.state_dict_options))

    def live_state_dict(self) -> dict[str, Any]:
        """As `state_dict`, but always with the live tensors. Checkpoints are made from it. Call on every rank."""
        return run_state(self, self.live_model_state())

    def live_model_state(self, options: StateDictOptions | None = None) -> dict[str, torch.Tensor]:
        """The model's tensors by clean name; without `options`, the live ones. Call on every rank."""
        return model_state(self.model, options)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by clean name; under FSDP2 they are DTensors."""
        return {clean_name(name): param for name, param in self.unwrapped_model.named_parameters()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, including the hooks' part. Call on every rank, between steps.

        A state from another number of processes has no `"rank"`. The random generators of each rank are then derived
        from seed, step and rank. You may call this in a hook's `on_after_step`: the run continues from the loaded step
        and its position in the data.

        Args:
            state_dict: As `state_dict` returned it, perhaps without `"rank"`.

        Raises:
            RuntimeError: A step is under way.
            ValueError: The state belongs to another model or optimizer.
        """
        self._build()
        load_whole_state(self, state_dict)
        self._initial_weights.drop()

    # ------------------------------------------------------------------ for hooks and scripts

    @property
    def is_finished(self) -> bool:
        """Whether the run is over: it has reached its limit, or the ranks agreed on a stop. The same on every rank."""
        return self._is_built and (self._length.is_reached or bool(self.control.agreed["stop"]))

    def is_due(self, interval: int | str) -> bool:
        """Whether a task that is done every `interval` steps is due after this step. "epoch": due if the step's window
        has ended an epoch. For a hook's `on_after_step`; the same on every rank.
        """
        if self.dry_run and self.is_finished:
            return True  # so that every periodic task is done once
        return self.step_info.ends_epoch if interval == "epoch" else self.step % int(interval) == 0

    def set_trainable(self, patterns: Iterable[str] | str) -> None:
        """Train only the parameters whose names match, from the next window on, and freeze all others. Call on every
        rank with the same patterns: before `train`, or in a hook's `on_before_step` or `on_after_step`. A checkpoint
        records which parameters are trained, and a resume restores that.

        Args:
            patterns: Names from `named_parameters`, or patterns such as `["head.*", "layers.11.*"]`. `*` stands for any
                characters, including dots. Each pattern must match. The optimizer must already have the parameters.

        Raises:
            RuntimeError: A step is under way.
            ValueError: A pattern matches nothing, or a parameter that matches cannot be trained.
        """
        self._build()
        self._trainable.select(patterns)

    def request_stop(self, reason: str | None = None) -> None:
        """End the run early, after the same step on all ranks. Call on any rank.

        The ranks agree once a window, before the update. A request made in `forward` or earlier ends the run with this
        step; a later request ends it with the next step. If you start a stopped run again, it ends at once, unless you
        raise the limit (see `on_resume` of `CheckpointingHook`). It then shows the `reason`.

        Args:
            reason: By default the name of the function that asked.
        """
        self.control.ask_to_stop(reason)

    def request_checkpoint(self) -> None:
        """Ask the `CheckpointingHook`s to save. As with `request_stop`, the ranks agree first. Call on any rank."""
        self.control.ask("checkpoint")

    @staticmethod
    def unwrap(module: nn.Module) -> nn.Module:
        """The module inside the wrappers of `torch.compile` and DDP, if there are any. Changes neither."""
        return unwrap(module)

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model as `build_model` returned it; under FSDP2 its parameters are shards."""
        return self.unwrap(self.model)
