"""The training loop: build -> prepare -> restore -> step after step.

    train ─► _run_step ─► _run_window      N x (batch ─► forward ─► backward)
                          norm             the one host read of the step: alike on every rank, it decides
                       ─► _optimizer_step  clip ─► update ─► learning rate
                          or _discard_window, and a new window

Accelerate owns devices, wrapping, mixed precision and the grad scaler; this file owns the window and the order of
things. Everything that must be the same on all ranks is decided from the gradient norm, which is, or from the control
message that the ranks exchange once a window.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed
from torch import nn

from .errors import LossNoneWarning, NonFiniteGradientError, TrainingError
from .evaluation import evaluate
from .evaluation.totals import Reduce
from .hook import BaseHook, CheckpointerHook
from .ranks import collectives
from .ranks.control import Control
from .ranks.peers import ENDED, Peers, is_lost_contact
from .records import Records, check_output, check_records, map_nested_tensor
from .rng import derived_seed, load_rng_state, rng_state
from .setup import factories
from .setup.launch import (
    check_accelerator,
    check_fsdp_version,
    rehearse_fsdp2_on_cpu,
    resolve_accumulation,
    resolve_mixed_precision,
    without_parallelism_on_cpu,
)
from .setup.report import announce
from .state.live import load_optimizer_state, optimizer_state
from .step.gradients import Gradients, no_contribution
from .step.info import StepInfo
from .step.loss_weights import loss_factors, weighted_loss
from .step.non_finite import BufferKeeper, NonFiniteReport, clean_name, diagnose

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

_NOTHING = nullcontext()
_MIN_LOSS_SCALE = 2.0**-14  # thirty halvings of the initial 2^16: no loss needs less, the gradient is broken


class BaseTrainer:
    """Trains a model: subclass it, write the `build_*` factories and `forward`, and call `train`.

    The same script runs under any `accelerate launch` configuration. One step is one applied optimizer update from
    exactly `gradient_accumulation_steps` micro-batches a process.

    Args:
        max_steps: Optimizer steps to run in all; a resumed run goes on to it.
        grad_clip: Limit of the gradient's 2-norm. None: nothing is clipped; the norm is taken all the same.
        max_non_finite_grad_retries: How often one step may be tried again with new data because its gradient was not
            finite, before `NonFiniteGradientError`. None: no limit; 0: raise at once. A loss scale that was too high
            doesn't count.
        mixed_precision: "no", "fp16", "bf16" or "fp8". None: what `accelerate launch` says.
        gradient_accumulation_steps: Micro-batches a step. None: what the launch says, else 1.
        workspace: Folder that hooks write to.
        device: None: Accelerate's choice. "cpu" forces the CPU.
        no_sync_accumulate: False: gradients are reduced at each micro-batch, which saves memory under FSDP2 and costs
            communication.
        state_dict_options: For `state_dict` and `load_state_dict`.
        logger: None: the logger "trainloop", on rank 0; it gets a handler if logging is not configured.
        accelerator: One that the script already has. None: `build_accelerator` makes it.
        seed: In [0, 2^31): the initial model (same on all ranks), the order of the data, and each rank's random
            generators. None: drawn from torch's global generator on rank 0.
        timeout: How long a collective waits for another rank before the run ends with an error, as a timedelta or in
            seconds; for all process groups of the process, those of a given `accelerator` too. A rank that dies is
            noticed at once, so it only limits ranks that hang or are slow. None: as Accelerate has it, 10 minutes with
            NCCL and 30 with gloo.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the launch configuration says otherwise.

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

    def __init__(
        self,
        max_steps: int,
        grad_clip: float | None = None,
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
    ) -> None:
        factories.check_arguments(
            max_steps=max_steps,
            grad_clip=grad_clip,
            max_non_finite_grad_retries=max_non_finite_grad_retries,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            no_sync_accumulate=no_sync_accumulate,
            state_dict_options=state_dict_options,
            accelerator=accelerator,
            seed=seed,
        )
        self.step = 0
        """The optimizer step that was begun last; the first is 1."""
        self.step_info = StepInfo()
        self.max_steps = max_steps
        self.grad_clip = grad_clip
        self.max_non_finite_grad_retries = max_non_finite_grad_retries
        self.mixed_precision = resolve_mixed_precision(mixed_precision)
        self.workspace = Path(workspace) if workspace is not None else None
        self.no_sync_accumulate = no_sync_accumulate
        self.state_dict_options = state_dict_options
        self.seed = seed
        self.timeout = factories.parse_timeout(timeout)
        self.hooks: list[BaseHook] = []
        wanted_device = factories.parse_device(device)

        self._forces_cpu = wanted_device is not None and wanted_device.type == "cpu"
        if accelerator is None:
            check_fsdp_version()
            self.gradient_accumulation_steps = resolve_accumulation(gradient_accumulation_steps)
            self.accelerator = factories.check_type(self.build_accelerator(), Accelerator, "build_accelerator")
            rehearse_fsdp2_on_cpu(self.accelerator)
        else:
            self.accelerator = accelerator
            self.gradient_accumulation_steps = gradient_accumulation_steps or accelerator.gradient_accumulation_steps
        is_ours = accelerator is None and type(self).build_accelerator is BaseTrainer.build_accelerator
        check_accelerator(
            self.accelerator,
            mixed_precision=self.mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            device=wanted_device,
            is_ours=is_ours,
        )
        if self.timeout is not None:
            collectives.set_timeout(self.timeout)
        self.mixed_precision = self.accelerator.mixed_precision
        self.logger = logger if logger is not None else factories.default_logger()

        self._is_built = False
        self.checkpointers: list[CheckpointerHook] = []
        """Those of the hooks that save the run."""
        self._restored_rng: dict[str, Any] | None = None
        self._skipped: list[int] = []
        self._checked_step = -1
        self.control = Control()
        """What hooks ask of all ranks, and what was agreed."""
        self.peers = Peers()
        """What the other ranks are doing, for the error if one is gone."""

    # ------------------------------------------------------------------ what a subclass writes

    def build_accelerator(self) -> Accelerator:
        """Make the `Accelerator`. The constructor calls it: set what an override needs before `super().__init__`."""
        timeout = [InitProcessGroupKwargs(timeout=self.timeout)] if self.timeout is not None else []
        with without_parallelism_on_cpu():
            return Accelerator(
                cpu=self._forces_cpu,
                mixed_precision=self.mixed_precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=self.gradient_accumulation_steps, sync_with_dataloader=False
                ),
                kwargs_handlers=timeout,
            )

    def build_data_loader(self) -> Iterable[Any]:
        """Return the training data: a `DataLoader` for one process (it is sharded over the ranks), or any iterable of
        batches. Required.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `build_data_loader`.")

    def build_eval_data_loader(self) -> Any:
        """Return the data that `evaluate` takes by default: a `DataLoader` for one process (it is sharded over the
        ranks such that each sample counts once), any iterable of batches, a mapping from names to such; or None.
        """
        return None

    def build_model(self) -> nn.Module:
        """Return the plain model; it is moved and wrapped by Accelerate. Required."""
        raise NotImplementedError(f"{type(self).__name__} must define `build_model`.")

    def build_optimizer(self) -> Optimizer:
        """Return the optimizer of `self.model`'s parameters. Required."""
        raise NotImplementedError(f"{type(self).__name__} must define `build_optimizer`.")

    def build_lr_scheduler(self) -> LRScheduler | None:
        """Return a scheduler of `self.optimizer` that moves once per applied update, or None."""
        return None

    def build_grad_scaler(self) -> torch.amp.GradScaler | None:
        """Return a grad scaler to use instead of Accelerate's own, or None."""
        return None

    def build_hooks(self) -> list[BaseHook]:
        """Return the hooks, called in this order."""
        return []

    def forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        """Compute the loss of one micro-batch. Required.

        Args:
            batch: What the data loader yields, on the device.

        Returns:
            The loss, a 0-dim tensor that requires grad, and nested records of numbers or 0-dim tensors to be averaged
            and logged (pass tensors: reading them is left to the log interval). A loss of None skips the micro-batch
            and draws another; on several ranks all must do so alike, without having called `self.model`. What one rank
            alone wants to drop gets a `batch_weight` of 0 instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward`.")

    def eval_forward(self, batch: Any) -> tuple[torch.Tensor | None, Records]:
        """Compute loss and records of one batch of the evaluation data; the model is in eval mode, without gradients.
        By default `forward`.

        Args:
            batch: What the evaluation's data loader yields, on the device.

        Returns:
            As `forward`. The records may also hold objects with `update`, which was called with this batch, `compute`,
            which reduces over the ranks, and `reset`, as torchmetrics has them: the same ones for every batch.
        """
        return self.forward(batch)

    def batch_weight(self, batch: Any) -> float | torch.Tensor | None:
        """How much this micro-batch weighs in the step's mean loss, for example its number of target tokens.

        With it the step's loss is the exact weighted mean over the window and all ranks, if `forward` returns the mean
        over the micro-batch. A weight of 0 drops the micro-batch: it runs, and adds exactly nothing, NaN included.

        Args:
            batch: What the data loader yields, on the device.

        Returns:
            A number >= 0 or a 0-dim tensor; None: all weigh the same. A number or a CPU tensor is best: of a weight on
            an accelerator only the loss can be masked when it is 0, since reading it would cost a sync.
        """
        return None

    # ------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run until `max_steps` or an agreed stop. Call on every rank.

        It may be called again after `max_steps` was raised, and goes on where it stood.

        Raises:
            NonFiniteGradientError: See `max_non_finite_grad_retries`.
            RankDisagreementError: `forward` skipped micro-batches on some ranks only.
            TrainingError: `forward` has returned no loss for a whole epoch; or another rank is gone or hangs, which the
                message names.
        """
        try:
            self.peers.open()
            self._build()
            self._restore_and_announce()
            with self._feed, self._accumulation():
                self._feed.start()
                if self._restored_rng is not None:  # last: starting the iterator may draw from the generators
                    load_rng_state(self._restored_rng, self.device)
                    self._restored_rng = None
                self.model.train()
                self.optimizer.train()  # type: ignore[attr-defined]  # of Accelerate's wrapper; for schedule-free ones
                self._gradients.drop()
                while self.step < self.max_steps and not self.control.agreed["stop"]:
                    self._run_step()
            self.control.take("stop")
            for hook in self.hooks:
                hook.on_after_train(self)
            self.peers.close()
        except BaseException as ex:
            told = self._explained(ex)
            for hook in self.hooks:
                try:
                    hook.on_exception(self, told)
                except Exception as another:  # must not hide the first, nor keep the other hooks from hearing of it
                    self.logger.error(f"{type(hook).__name__}.on_exception failed: {another}")
            if told is ex:
                raise
            raise told from ex

    def _explained(self, exception: BaseException) -> BaseException:
        """The exception that leaves `train`: where a rank waited in vain, one that says for whom. What ends this rank
        alone is told to the others, which would see no more than that it is gone.
        """
        if collectives.world_size() == 1:
            return exception
        if is_lost_contact(exception):
            resumes = " Started again, the run goes on from its last checkpoint." if self.checkpointers else ""
            return TrainingError(self.peers.explain(collectives.timeout()) + resumes)
        if not isinstance(exception, TrainingError | SystemExit):  # those leave every rank alike
            fate = f"{ENDED} {type(exception).__name__}: {exception}"
            self.peers.tell({collectives.rank(): fate})
        return exception

    def _run_step(self) -> None:
        self.step += 1
        self.peers.step = self.step
        self.peers.enter("hooks")
        info = self.step_info = StepInfo()
        for hook in self.hooks:
            hook.on_before_step(self)
        start = time.perf_counter()
        while True:
            self._run_window()
            self.control.start(self._skipped)
            norm = self._gradients.norm()
            self.peers.enter("waiting for the other ranks' messages")
            self.control.finish(self.step)  # before the device is waited for, which may never hear of a rank that died
            info.grad_norm = norm.item()  # the step's one device-to-host sync
            if math.isfinite(info.grad_norm):
                self._gradients.clip(norm, info.grad_norm)
                break
            if self._is_overflow_of_norm():
                break
            self._discard_window()
        self._optimizer_step()
        info.step_time = time.perf_counter() - start
        self.peers.enter("hooks")
        for hook in self.hooks:
            hook.on_after_step(self)
        self.peers.enter("saving a checkpoint")
        for checkpointer in self.checkpointers:  # after every hook, so that their order doesn't matter
            checkpointer.save_if_due(self)

    def _run_window(self) -> None:
        """N micro-batches forward and backward, all of them on every rank; the gradient is reduced with the last."""
        self.peers.enter("forward and backward")
        info, num_micro_steps = self.step_info, self.gradient_accumulation_steps
        start = time.perf_counter()
        info.losses, info.records, info.loss_factors = [], [], None
        self._skipped = []
        self._buffers.remember()
        window = self._draw_weighted_window() if self._is_weighted else None
        micro_step = num_drawn = 0
        while micro_step < num_micro_steps:
            is_last = micro_step == num_micro_steps - 1
            if num_micro_steps > 1:
                self.accelerator.sync_gradients = is_last
            batch = self._next_batch() if window is None else window[micro_step]
            factor = None if info.loss_factors is None else info.loss_factors[micro_step]
            with self._around(is_last, factor):
                loss, records = self._checked(self.forward(batch))
                if loss is None:
                    self._skip_micro_batch(num_drawn)
                else:
                    info.losses.append(loss.detach())
                    info.records.append(map_nested_tensor(torch.Tensor.detach, records) if records else records)
                    if is_last:
                        info.own_time = time.perf_counter() - start
                    self._backward(loss if factor is None else weighted_loss(loss, factor))
                    micro_step += 1
            num_drawn += 1

    def _optimizer_step(self) -> None:
        for hook in self.hooks:
            hook.on_before_optimizer_step(self)
        self._raw_optimizer.step()
        if self.grad_scaler is not None:
            self.grad_scaler.update()
        self._gradients.drop()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        for hook in self.hooks:
            hook.on_after_optimizer_step(self)

    # ------------------------------------------------------------------ parts of a window

    def _next_batch(self) -> Any:
        start = time.perf_counter()
        batch = next(self._feed)
        self.step_info.data_time += time.perf_counter() - start
        return batch

    def _around(self, is_last: bool, factor: Any) -> AbstractContextManager[Any]:
        """Around a micro-batch: before the last one nothing is reduced, and of one of weight 0 neither its gradient
        nor what it does to buffers may stay. A weight on the device isn't read by the host: there `weighted_loss` masks
        the loss, and that is all.
        """
        is_deferred = self._defers_reduction and not is_last
        is_dropped = isinstance(factor, float) and factor == 0.0
        if not (is_deferred or is_dropped):
            return _NOTHING
        stack = ExitStack()
        if is_deferred:
            stack.enter_context(self.accelerator.no_sync(self.model))
        if is_dropped:
            stack.enter_context(no_contribution(self.model))
            stack.enter_context(BufferKeeper(self.unwrapped_model).kept())
        return stack

    def _checked(self, output: Any) -> tuple[torch.Tensor | None, Records]:
        loss, records = check_output(output, "forward")
        if loss is not None and not loss.requires_grad:
            raise ValueError(
                "The loss that `forward` returns does not require grad: it was detached, computed under"
                " `torch.no_grad()`, or doesn't depend on the model."
            )
        if self.step != self._checked_step:  # once a step is enough to catch it early, and costs nothing
            self._checked_step = self.step
            check_records(records)
        return loss, records

    def _skip_micro_batch(self, draw: int) -> None:
        self._skipped.append(draw)
        self.step_info.skipped_micro_batch_count += 1
        if self._is_weighted:
            raise ValueError(
                "`forward` returned None for the loss, but the window's weights are already agreed on, because"
                " `batch_weight` is overridden. Return 0 from `batch_weight` for a micro-batch to be dropped."
            )
        if self.accelerator.num_processes > 1:
            warnings.warn(
                "`forward` returned None for the loss. Every rank must do so for the same micro-batch, and without"
                " having called the model; what one rank alone wants to drop gets a `batch_weight` of 0.",
                LossNoneWarning,
                stacklevel=3,
            )
        self._guard_against_no_loss()

    def _guard_against_no_loss(self) -> None:
        info = self.step_info
        if info.losses:
            return
        if info.skipped_micro_batch_count == 1:
            self._fruitless_since = self._feed.epoch
        if self._feed.epoch > self._fruitless_since + 1:
            raise TrainingError(
                f"Step {self.step}: no micro-batch of a whole epoch gave a loss; `forward` returned None, or"
                " `batch_weight` 0, for each."
            )

    def _draw_weighted_window(self) -> list[Any]:
        """Draw the window before its first backward, because each micro-batch's factor depends on all the weights."""
        while True:
            window = [self._next_batch() for _ in range(self.gradient_accumulation_steps)]
            factors, total = loss_factors([self.batch_weight(batch) for batch in window], self.device)
            if factors != []:
                self.step_info.loss_factors, self.step_info.total_weight = factors, total
                return window
            self.step_info.skipped_micro_batch_count += len(window)  # nothing in it, on any rank: draw another
            self._guard_against_no_loss()

    def _backward(self, loss: torch.Tensor) -> None:
        if self._is_plain:  # what accelerator.backward comes to, without its detours
            share = loss if self.gradient_accumulation_steps == 1 else loss / self.gradient_accumulation_steps
            share.backward()  # type: ignore[no-untyped-call]
        else:
            self.accelerator.backward(loss)

    # ------------------------------------------------------------------ what happens instead of an update

    def _is_overflow_of_norm(self) -> bool:
        """Whether the gradient is finite and only the sum of its squares overflowed; then it is clipped here."""
        largest = self._gradients.largest()
        if not math.isfinite(largest):
            return False
        self.step_info.grad_norm = self._gradients.clip_overflown(largest)
        self.logger.warning(
            f"Step {self.step}: the gradient norm overflowed ({self.step_info.grad_norm:.3g}), but every gradient is"
            " finite: the step is taken" + (", clipped." if self.grad_clip is not None else ".")
        )
        return True

    def _discard_window(self) -> None:
        """Undo the window, which every rank has completed: gradients dropped, buffers put back, its batches stay
        consumed. Raises where another try is no use.
        """
        info = self.step_info
        self._buffers.restore()
        report = diagnose(self.unwrapped_model, info.losses)
        self._gradients.drop()
        if report.parameters:
            raise NonFiniteGradientError(self._give_up("the parameters themselves are non-finite", report))
        if self.grad_scaler is not None:
            self.grad_scaler.update()  # what unscaling found lowers the scale
            info.overflow_count += 1
            scale = self.grad_scaler.get_scale()
            if scale < _MIN_LOSS_SCALE:
                raise NonFiniteGradientError(self._give_up(f"the loss scale collapsed to {scale:.3g}", report))
            self.logger.warning(f"Step {self.step}: gradient overflow, loss scale lowered to {scale:g}; trying again.")
            return
        retry, limit = info.non_finite_grad_retry_count + 1, self.max_non_finite_grad_retries
        if limit is not None and retry > limit:
            raise NonFiniteGradientError(self._give_up(f"{limit} retries are used up", report))
        info.non_finite_grad_retry_count = retry
        self.logger.warning(
            f"Step {self.step}: the gradient is not finite; the window is discarded and drawn anew (retry {retry}"
            f"{'' if limit is None else f' of {limit}'}). {report}"
        )
        for hook in self.hooks:
            hook.on_non_finite_grad(self, retry)

    def _give_up(self, reason: str, report: NonFiniteReport) -> str:
        return (
            f"Step {self.step}: the gradient is not finite and {reason} (retries so far:"
            f" {self.step_info.non_finite_grad_retry_count}). {report}. {report.advice}"
        )

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, data_loader: Any = None, *, reduce: Mapping[str, Reduce] | None = None) -> dict[str, Any]:
        """Run `eval_forward` over held-out data. Call on every rank, between steps; logs nothing.

        Each sample counts exactly once, whatever the number of ranks and the size of the last batch: records and loss
        are averaged over the batches by their number of samples, or by `batch_weight` if it is overridden. Each batch
        draws the same noise at every evaluation. Modes, buffers, random generators and position of the training run are
        as before, bit for bit; BatchNorm has rank 0's statistics everywhere. Before `train` it evaluates the model as
        it was built; after it, or after `load_state_dict`, as it was trained.

        Args:
            data_loader: As `build_eval_data_loader` returns it. None: what that returned.
            reduce: How a record is reduced over batches and ranks, by its name ("a/b"): "mean" (the default of each),
                "sum", "max" or "min".

        Returns:
            Nested numbers, the same on every rank: `{"loss": …, <records>}`, for a mapping of loaders by name.

        Raises:
            TypeError: The data is not iterable.
            ValueError: There is none, or it cannot be sharded such that each sample counts once.
        """
        self._build()
        data_loader = data_loader if data_loader is not None else self.eval_data_loader
        if data_loader is None:
            raise ValueError("`evaluate` has no data: `build_eval_data_loader` returned None. Override it.")
        result = evaluate(self, data_loader, reduce or {})
        assert result is not None, "it stops early only where it is told to"
        return result

    # ------------------------------------------------------------------ build, restore

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        device: torch.device = self.accelerator.device
        return device

    def _build(self) -> None:
        """Make everything, once; a later `train` goes on with it."""
        if self._is_built:
            return
        self.peers.enter("building the run")
        accelerator = self.accelerator
        if self.seed is None:
            self.seed = collectives.broadcast_object(int(torch.randint(2**31, ())))
        set_seed(self.seed)
        self.data_loader = self.build_data_loader()
        self._feed = factories.data_feed(self.data_loader, self.seed, accelerator)
        self.eval_data_loader = self.build_eval_data_loader()
        set_seed(self.seed)  # the model doesn't depend on what building the data drew
        self.model = factories.check_model(self.build_model())
        self.optimizer = factories.check_type(self.build_optimizer(), torch.optim.Optimizer, "build_optimizer")
        self.lr_scheduler = factories.check_lr_scheduler(self.build_lr_scheduler())
        scaler = self.build_grad_scaler()
        if scaler is not None:
            accelerator.scaler = factories.check_type(scaler, torch.amp.GradScaler, "build_grad_scaler")
        self.grad_scaler = (
            accelerator.scaler if accelerator.scaler is not None and accelerator.scaler.is_enabled() else None
        )
        self.model, self.optimizer = factories.prepare(accelerator, self.model, self.optimizer)
        self._raw_optimizer: Optimizer = factories.raw_optimizer(self.optimizer)
        factories.check_optimizer_params(self._raw_optimizer, self.model)
        self.hooks = factories.check_hooks(self.build_hooks(), self.workspace)
        set_seed(self.seed, device_specific=True)  # from here on each rank draws its own noise

        self._is_plain = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
        self._is_weighted = self._has_batch_weight()
        self._defers_reduction = self.no_sync_accumulate and accelerator.num_processes > 1
        self._gradients = Gradients(self.model, self.grad_clip, self.grad_scaler, self._raw_optimizer)
        self._buffers = BufferKeeper(self.unwrapped_model)
        self.checkpointers = [hook for hook in self.hooks if isinstance(hook, CheckpointerHook)]
        self._fruitless_since = 0
        self._is_restored = False
        self._is_built = True
        if self.timeout is not None:
            collectives.set_timeout(self.timeout, self.model)
        announce(self)

    def _has_batch_weight(self) -> bool:
        return type(self).batch_weight is not BaseTrainer.batch_weight

    def _restore_and_announce(self) -> None:
        """The trainer's state comes back before any hook hears of the run, a hook's own right after it has."""
        self.peers.enter("restoring the run")
        state_dict = None
        if not self._is_restored:
            self._is_restored = True
            state_dict = next(filter(None, (hook.restore(self) for hook in self.checkpointers)), None)
        for hook in self.hooks:
            hook.on_before_train(self)
            if state_dict is not None:
                hook.on_load_state_dict(self, state_dict)

    def _accumulation(self) -> AbstractContextManager[None]:
        return factories.accumulation_state(self.accelerator, self.gradient_accumulation_steps)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the run. Call on every rank, between steps.

        Returns:
            `"model"`: tensors by parameter name; `"training_state"`: step, seed, optimizer, lr_scheduler, grad_scaler,
            data position (the same on every rank); `"rank"`: random generators and what else belongs to this rank only;
            and what the hooks add. Tensors are the live ones, unless `state_dict_options` says otherwise.
        """
        return self._state_dict(self.live_model_state(self.state_dict_options))

    def live_state_dict(self) -> dict[str, Any]:
        """`state_dict` with the live tensors, whatever `state_dict_options` says: what a checkpoint is made of."""
        return self._state_dict(self.live_model_state())

    def live_model_state(self, options: StateDictOptions | None = None) -> dict[str, torch.Tensor]:
        """The model's tensors by clean name; without `options` the live ones. Call on every rank."""
        if options is None:  # what torch's function comes to, which takes half a second to load and more for each name
            return {clean_name(name): tensor for name, tensor in self.unwrapped_model.state_dict().items()}
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return state

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by clean name; under FSDP2 they are DTensors."""
        return {clean_name(name): param for name, param in self.unwrapped_model.named_parameters()}

    def _state_dict(self, model: dict[str, torch.Tensor]) -> dict[str, Any]:
        state_dict: dict[str, Any] = {
            "model": model,
            "training_state": {
                "step": self.step,
                "seed": self.seed,
                "optimizer": optimizer_state(self.unwrapped_model, self._raw_optimizer),
                "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler is not None else None,
                "grad_scaler": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
                "data": self._feed.state_dict(),
            },
            "rank": {"rng": rng_state(self.device), "data": self._feed.rank_state_dict()},
        }
        for hook in self.hooks:
            hook.on_state_dict(self, state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, the hooks' part included. Call on every rank, between steps.

        Without `"rank"` (saved at another number of processes) the random generators of each rank are derived anew
        from seed, step and rank.

        Args:
            state_dict: As `state_dict` returned it, perhaps without `"rank"`.

        Raises:
            ValueError: The state is not that of this model and optimizer.
        """
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        self._build()
        self.load_training_state(state_dict)
        set_model_state_dict(self.model, state_dict["model"], options=self.state_dict_options)
        for hook in self.hooks:
            hook.on_load_state_dict(self, state_dict)

    def load_training_state(self, state_dict: dict[str, Any]) -> None:
        """`load_state_dict` without the model, which a resume reads in place, and without the hooks, which get their
        part later. Call on every rank.

        Args:
            state_dict: As for `load_state_dict`; `"model"` isn't looked at.

        Raises:
            ValueError: The state is not that of this optimizer, schedule, scaler or data.
        """
        state, rank_state = state_dict["training_state"], state_dict.get("rank")
        for name, own in (("lr_scheduler", self.lr_scheduler), ("grad_scaler", self.grad_scaler)):
            if (state[name] is None) != (own is None):
                has, had = ("no", "one") if own is None else ("one", "none")
                raise ValueError(f"`build_{name}` gives this run {has} {name}, but the saved one had {had}.")
        load_optimizer_state(self.unwrapped_model, self._raw_optimizer, state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        self.step, self.seed = state["step"], state["seed"]
        self._feed.load_state_dict(state["data"], rank_state["data"] if rank_state is not None else None)
        if rank_state is not None:
            self._restored_rng = rank_state["rng"]
            load_rng_state(rank_state["rng"], self.device)
        else:
            set_seed(derived_seed(state["seed"], self.step, self.accelerator.process_index))

    # ------------------------------------------------------------------ for hooks and scripts

    def log(self, records: Records, dry_run: bool = False) -> None:
        """Hand numbers to every hook's `on_log`. Call on any rank; hooks that write do so on rank 0.

        Args:
            records: Nested numbers or 0-dim tensors, for example `{"val": {"loss": 0.1}}`.
            dry_run: The hooks say what they would write, and write nothing.
        """
        for hook in self.hooks:
            hook.on_log(self, records, dry_run)

    def log_images(self, records: dict[str, Any], dry_run: bool = False) -> None:
        """Hand images to every hook's `on_log_images`. Call on every rank if there are DTensors among them.

        Args:
            records: Nested images: Pillow's, tensors or numpy arrays, H x W or C x H x W, or batches N x C x H x W.
            dry_run: The hooks say what they would write, and write nothing.
        """
        for hook in self.hooks:
            hook.on_log_images(self, records, dry_run)

    def request_stop(self) -> None:
        """End the run early, on all ranks after the same step. Call on any rank.

        The ranks agree once a window, before the update: asked for in `forward` or before, the run ends with this step;
        asked for later (`on_after_step`), with the next one. It is so at any number of processes, one included.
        """
        self.control.ask("stop")

    def request_checkpoint(self) -> None:
        """Have the `CheckpointingHook`s save as soon as the ranks have agreed, as `request_stop`. Call on any rank."""
        self.control.ask("checkpoint")

    @staticmethod
    def unwrap(module: nn.Module) -> nn.Module:
        """The module inside `torch.compile`'s and DDP's wrappers. Changes neither.

        Args:
            module: Wrapped or not.
        """
        while True:
            inner = getattr(module, "_orig_mod", None)
            if inner is None and isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
                inner = module.module
            if inner is None:
                return module
            module = inner

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model as `build_model` returned it; under FSDP2 its parameters are shards."""
        return self.unwrap(self.model)
