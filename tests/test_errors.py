"""Each wrong use gives an error that names what must be changed, before anything is lost."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, LoggingHook, ProgressHook, Trainer

from .launching import REPOSITORY, launch
from .small import SmallTrainer


def train(**kwargs: Any) -> Callable[[], None]:
    return lambda: SmallTrainer(**kwargs).train()


def build(**kwargs: Any) -> Callable[[], Any]:
    return lambda: SmallTrainer(**kwargs)


def linear_loss(self: Any, batch: Any) -> torch.Tensor:
    return self.model(batch[0]).mean()


class ModelOutput(OrderedDict[str, Any]):
    """As transformers' of that name: a dict whose keys are attributes too."""


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor | None = None


class Empty(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(())


class NeedsWorkspace(BaseHook):
    needs_workspace = True


class TimmScheduler:
    """As `timm.scheduler.Scheduler`, which steps by the epoch."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}


class AccumulateBy(BaseHook):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_before_step(self, trainer: BaseTrainer) -> None:
        trainer.gradient_accumulation_steps = self.number


PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau
OTHER = nn.Linear(2, 2)
CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # arguments
    (build(max_steps=-1), ValueError, "`max_steps` must be at least 0, but is -1."),
    (build(max_steps=1.5), TypeError, "`max_steps` must be an integer or None, but is 1.5 (float)."),
    (build(grad_clip=0), ValueError, "`grad_clip` must be positive and finite, but is 0. None turns clipping off."),
    (build(grad_clip="1"), TypeError, "`grad_clip` must be a number or None, but is '1' (str)."),
    (build(max_non_finite_grad_retries=-1), ValueError, "`max_non_finite_grad_retries` must be at least 0, but is -1."),
    (build(gradient_accumulation_steps=0), ValueError, "`gradient_accumulation_steps` must be at least 1, but is 0."),
    (build(mixed_precision="half"), ValueError, "`mixed_precision` must be one of ('no', 'fp16', 'bf16', 'fp8')"),
    (build(mixed_precision="fp16", device="cpu"), ValueError, "`mixed_precision` 'fp16' needs a GPU"),
    (build(seed=2**31), ValueError, "`seed` must be below 2**31, but is 2147483648."),
    (build(timeout=0), ValueError, "`timeout` must be positive and finite, but is 0."),
    (build(timeout=float("inf")), ValueError, "`timeout` must be positive and finite, but is inf."),
    (build(timeout="1h"), TypeError, "`timeout` must be a timedelta, seconds or None, but is '1h' (str)."),
    (build(no_sync_accumulate=1), TypeError, "`no_sync_accumulate` must be True or False, but is 1 (int)."),
    (build(accelerator="cpu"), TypeError, "`accelerator` must be an accelerate.Accelerator, but is 'cpu' (str)."),
    (build(device="cuda:7"), ValueError, "`device` is 'cuda:7', but Accelerate runs this process on 'cpu'."),
    (build(device="gpu"), ValueError, "`device`"),
    (build(state_dict_options={}), TypeError, "`state_dict_options`"),
    (lambda: ProgressHook(interval=0), ValueError, "`interval` must be at least 1, but is 0."),
    (lambda: LoggingHook(interval="5"), ValueError, "`interval` must be a number of steps or"),
    (
        lambda: ProgressHook(eta_warmup=-1),
        ValueError,
        "`eta_warmup` must be at least 0, but is -1.",
    ),
    (
        lambda: Trainer(model=OTHER, optimizer=None, data_loader=[], forward=3, max_steps=1),  # type: ignore[arg-type]
        TypeError,
        "`forward` must be callable, but is 3 (int).",
    ),
    # what factories return
    (train(model_=lambda self: None), TypeError, "`build_model` must return a Module, but returned None (NoneType)."),
    (
        train(model_=lambda self: nn.ParameterList([torch.empty(3, device="meta")])),
        ValueError,
        "`build_model` returned a model on the meta device, and nothing initialises 1 tensors: 0.",
    ),
    (train(optimizer_=lambda self: 3), TypeError, "`build_optimizer` must return a Optimizer, but returned 3 (int)."),
    (
        train(optimizer_=lambda self: torch.optim.SGD(OTHER.parameters())),
        ValueError,
        "`build_optimizer` must return an optimizer of `self.model`'s parameters, but 2 of its parameters are not in",
    ),
    (
        train(lr_scheduler_=lambda self: PLATEAU(self.optimizer)),
        ValueError,
        "`build_lr_scheduler` returned ReduceLROnPlateau without a metric.",
    ),
    (
        train(lr_scheduler_=lambda self: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(OTHER.parameters(), 0.1), 1)),
        ValueError,
        "`build_lr_scheduler` must return a scheduler of `self.optimizer`, but that of StepLR is another optimizer",
    ),
    (train(lr_scheduler_=lambda self: 0.1), TypeError, "`build_lr_scheduler` must return a scheduler or None"),
    (
        train(lr_scheduler_=lambda self: TimmScheduler()),
        TypeError,
        "`build_lr_scheduler` must return a scheduler whose `step()` needs no argument, but that of"
        " tests.test_errors.TimmScheduler needs epoch.",
    ),
    (
        train(optimizer_=lambda self: torch.optim.LBFGS(self.model.parameters())),
        TypeError,
        "`build_optimizer` must return an optimizer that steps once for each gradient, but LBFGS evaluates the loss",
    ),
    (
        train(model_=lambda self: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))),
        ValueError,
        "but 2 parameters of lazy modules have no shape yet (first: 0.weight). Run one batch through the model",
    ),
    (
        train(model_=lambda self: nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1))),
        ValueError,
        "`build_model` returned embeddings with sparse gradients (first: 0)",
    ),
    (
        train(hooks_=lambda self: [AccumulateBy(0)]),
        ValueError,
        "`gradient_accumulation_steps` must be at least 1, but is 0.",
    ),
    (
        lambda: SmallTrainer(kwargs_handlers=[{"find_unused_parameters": True}]),
        TypeError,
        "`kwargs_handlers` must be a list of Accelerate's kwargs handlers",
    ),
    (
        lambda: SmallTrainer(kwargs_handlers=[accelerate.InitProcessGroupKwargs()], timeout=3.0),
        ValueError,
        "`timeout` and the `InitProcessGroupKwargs` in `kwargs_handlers` both set the timeout. Give only one.",
    ),
    (train(grad_scaler_=lambda self: 8), TypeError, "`build_grad_scaler` must return a GradScaler, but returned 8"),
    (train(hooks_=lambda self: 3), TypeError, "`build_hooks` must return a list of hooks, but returned 3 (int)."),
    (train(hooks_=lambda self: [print]), TypeError, "`build_hooks` must return objects of BaseHook, but one is"),
    (
        train(hooks_=lambda self: [NeedsWorkspace()]),
        ValueError,
        "NeedsWorkspace writes to `workspace`, but it is None. Pass a folder to the trainer.",
    ),
    # data
    (
        train(data_loader=lambda self: None),
        TypeError,
        "`build_data_loader` must return a DataLoader or another iterable",
    ),
    (train(data_loader=lambda self: "abc"), TypeError, "`build_data_loader` must return an iterable of batches"),
    (train(data_loader=lambda self: []), ValueError, "`build_data_loader` returned data without a sample."),
    (train(data_loader=lambda self: DataLoader(Empty())), ValueError, "returned data without a batch."),
    (train(data_loader=lambda self: iter([])), ValueError, "returned data without a batch."),
    (
        train(max_steps=3, data_loader=lambda self: iter([(torch.ones(1, 3),)] * 2)),
        ValueError,
        "The data ended before `max_steps`, and can't be iterated again",
    ),
    (
        train(data_loader=lambda self: DataLoader(TensorDataset(torch.ones(3, 3)), batch_size=4, drop_last=True)),
        ValueError,
        "The data set gives 3 samples an epoch, but `drop_last=True` drops what doesn't fill a global batch of 4.",
    ),
    # forward
    (
        train(forward_=lambda self, batch: linear_loss(self, batch)),
        TypeError,
        "(Tensor). Return `loss, {}` if there is nothing to log.",
    ),
    (
        train(forward_=lambda self, batch: {"loss": linear_loss(self, batch), "a": 1}),
        TypeError,
        '(dict). Return `output["loss"], {}`, or a dict of numbers to log in place of `{}`.',
    ),
    (
        train(forward_=lambda self, batch: ModelOutput(loss=linear_loss(self, batch))),
        TypeError,
        '(ModelOutput). Return `output["loss"], {}`, or a dict of numbers to log in place of `{}`.',
    ),
    (
        train(forward_=lambda self, batch: (ModelOutput(loss=linear_loss(self, batch)), {})),
        TypeError,
        '(ModelOutput). Return `output["loss"], {}`, or a dict of numbers to log in place of `{}`.',
    ),
    (
        train(forward_=lambda self, batch: Output(linear_loss(self, batch))),
        TypeError,
        "(Output). Return `output.loss, {}`, or a dict of numbers to log in place of `{}`.",
    ),
    (
        train(forward_=lambda self, batch: None),
        TypeError,
        "`forward` must return a tuple (loss, records), but returned None (NoneType). Does it end without `return`?",
    ),
    (train(forward_=lambda self, batch: (0.5, {})), TypeError, "The loss that `forward` returns must be a tensor"),
    (
        train(forward_=lambda self, batch: (self.model(batch[0]), {})),
        ValueError,
        "The loss that `forward` returns must have no dimensions, but has shape (2, 1). Take its mean.",
    ),
    (
        train(forward_=lambda self, batch: (linear_loss(self, batch).detach(), {})),
        ValueError,
        "The loss that `forward` returns does not require grad",
    ),
    (
        train(forward_=lambda self, batch: (linear_loss(self, batch), None)),
        TypeError,
        "The records that `forward` returns must be a mapping (`{}` if there are none), but are None (NoneType).",
    ),
    (
        train(forward_=lambda self, batch: (linear_loss(self, batch), {"a": {"b": "high"}})),
        TypeError,
        "The record \"a/b\" must be a number or a 0-dim tensor, but is 'high' (str).",
    ),
    (
        train(forward_=lambda self, batch: (linear_loss(self, batch), {"a": batch[0]})),
        ValueError,
        'The record "a" must be a number or a tensor of one element, but has shape (2, 3).',
    ),
    (
        train(forward_=lambda self, batch: (linear_loss(self, batch), {1: 2.0})),
        TypeError,
        "The keys of records must be strings, but records has 1 (int).",
    ),
]


@pytest.mark.parametrize(("use", "kind", "message"), CASES, ids=[message[:50] for *_, message in CASES])
def test_a_wrong_use_is_told_as_such(use: Callable[[], Any], kind: type[Exception], message: str) -> None:
    """The error names the argument or the factory, what it must be and what it was."""
    with pytest.raises(kind, match=re.escape(message)):
        use()


@pytest.mark.parametrize(
    ("environment", "kwargs", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {"mixed_precision": "no"},
            "`mixed_precision` is 'no', but the launch configuration says 'bf16'.",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
            {"gradient_accumulation_steps": 4},
            "`gradient_accumulation_steps` is 4, but the launch configuration says 2.",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "two"},
            {},
            "`ACCELERATE_GRADIENT_ACCUMULATION_STEPS` must be a number, but is 'two'.",
        ),
        (
            {"WORLD_SIZE": "2"},
            {},
            "2 processes were launched, but each believes that it is alone, because no device was found that they could"
            " share. To run them on the CPU, set `ACCELERATE_USE_CPU=true` before `accelerate launch`.",
        ),
    ],
)
def test_a_conflict_with_the_launch_is_an_error(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kwargs: dict[str, Any], message: str
) -> None:
    """Configuration given at launch is honoured, and never silently overruled or ignored."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        SmallTrainer(**kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_batches": True}, "Divide it by the number of processes"),
        ({"dispatch_batches": True}, "each rank reads its own batches here."),
        ({"data_seed": 5}, "the order of the data follows the trainer's `seed`, which is 0. Pass it as `seed`."),
        ({"even_batches": False, "use_seedable_sampler": True, "non_blocking": True, "data_seed": 0}, None),
    ],
)
def test_each_option_of_a_data_loader_configuration_is_honoured_or_refused(
    options: dict[str, Any], message: str | None
) -> None:
    """What the trainer does in another way is refused with the remedy; nothing is ignored."""
    config = accelerate.DataLoaderConfiguration(**options)
    trainer = SmallTrainer(accelerator=accelerate.Accelerator(cpu=True, dataloader_config=config))
    if message is None:
        trainer.train()
        assert trainer.step == 2
        assert trainer._feed.non_blocking
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.train()


def test_exit_signals_are_refused_outside_of_the_main_thread(tmp_path: Path) -> None:
    """Python handles signals in the main thread only; the error says so, before the first step."""
    errors: list[BaseException] = []

    def run() -> None:
        hooks: Any = lambda self: [CheckpointingHook(1, exit_signals="SIGTERM")]  # noqa: E731
        try:
            SmallTrainer(workspace=tmp_path, hooks_=hooks).train()
        except ValueError as ex:
            errors.append(ex)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert str(errors[0]).startswith("`exit_signals` needs `train` to be called in the main thread")


def test_two_trainers_of_a_process_share_one_mixed_precision() -> None:
    """Accelerate keeps it for the whole process: another one for the second trainer is an error that says so."""
    SmallTrainer(mixed_precision="bf16").train()
    with pytest.raises(ValueError, match="`mixed_precision` is 'no', but this process already has an `Accelerator`"):
        SmallTrainer(mixed_precision="no")


def test_an_accelerator_made_before_the_trainer_decides_for_the_process() -> None:
    """The error says which settings must be the same, in both directions."""
    accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(ValueError, match=r"^`mixed_precision` should be 'no', but .* Give every `Accelerator`"):
        SmallTrainer()
    with pytest.raises(ValueError, match=r"^`mixed_precision` is 'no', but .* Give every `Accelerator` and trainer"):
        SmallTrainer(mixed_precision="no")
    SmallTrainer(mixed_precision="bf16").train()


def test_an_accelerator_with_another_accumulation_is_a_conflict() -> None:
    """An `Accelerator` of the script says one number, the argument another."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 4, but the `Accelerator` was built with 2"):
        SmallTrainer(accelerator=accelerator, gradient_accumulation_steps=4)


@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize(
    ("name", "launched", "options", "message"),
    [
        ("MIXED_PRECISION", "bf16", {"mixed_precision": "no"}, "`mixed_precision` should be 'bf16', but .* with 'no'"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "plugin", "`gradient_accumulation_steps` is 2, but the launch .* says 4"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", "argument", "is 3, but the launch configuration says 1"),
    ],
)
def test_an_accelerator_of_the_script_passes_the_checks_of_the_launch(
    monkeypatch: pytest.MonkeyPatch, name: str, launched: str, options: Any, message: str, is_given: bool
) -> None:
    """What the script's `Accelerator` does in spite of the launch is an error, given or from `build_accelerator`."""
    monkeypatch.setenv(f"ACCELERATE_{name}", launched)
    plugin = accelerate.utils.GradientAccumulationPlugin(num_steps=2)
    kwargs = {"plugin": {"gradient_accumulation_plugin": plugin}, "argument": {}}.get(str(options), options)
    arguments = {"gradient_accumulation_steps": 3} if options == "argument" else {}
    accelerator = accelerate.Accelerator(cpu=True, **kwargs)

    class Builds(SmallTrainer):
        def build_accelerator(self) -> accelerate.Accelerator:
            return accelerator

    trainer = functools.partial(SmallTrainer, accelerator=accelerator) if is_given else Builds
    with pytest.raises(ValueError, match=message):
        trainer(**arguments)


def test_the_accumulation_of_a_script_s_accelerator_is_that_of_the_run() -> None:
    """Also of one from `build_accelerator`, which trained with one micro-batch a step."""

    class Builds(SmallTrainer):
        def build_accelerator(self) -> accelerate.Accelerator:
            return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    assert Builds().gradient_accumulation_steps == 2


def test_ranks_that_disagree_are_told_on_every_rank(tmp_path: Path) -> None:
    """Where one rank alone does something else, all ranks raise, none hangs, and the next trainer works."""
    launch(REPOSITORY / "tests" / "workers" / "errors.py", "ddp2", str(tmp_path))
    for rank in range(2):
        messages = json.loads((tmp_path / f"{rank}.json").read_text())
        wanted = {
            "StateFirst": "ValueError: 2 processes were launched, but each believes that it is alone, because the"
            " script created a `PartialState()` first.",
            "PluginOfTheScript": "ValueError: The `Accelerator` has an FSDP plugin of the script, which Accelerate"
            " ignores on CPU processes.",
            "NoneOnOneRank": "RankDisagreementError: Step 1: `forward` returned None for different micro-batches on"
            " different ranks (draws of the window, from 0: rank 0: none; rank 1: [0]).",
            "SomeWeights": "ValueError: `batch_weight` must return a weight for every micro-batch or None for every"
            " one, but of a window's 2 micro-batches 1 have a weight.",
            "BadWeight": "ValueError: `batch_weight` must return a finite number >= 0",
            "OwnLoader": "ValueError: Mine iterates in a way of its own, so it can't be sharded over 2 processes",
            "TooSmall": "ValueError: The data set gives 3 samples an epoch, but `drop_last=True` drops what doesn't"
            " fill a global batch of 4.",
            "NoneForEver": "TrainingError: ",
            "afterwards": "2",
        }
        assert messages.keys() == wanted.keys()
        assert [name for name, text in wanted.items() if not messages[name].startswith(text)] == [], messages
