"""Mistakes in a user's own trainer and hooks are found before the first step: misspelt methods, a missing `super()`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import trainloop
from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, ProgressHook, Trainer
from trainloop.setup.subclasses import check_hook

from .small import SmallTrainer


def nothing(self: Any, *args: Any) -> None:
    """A method that takes whatever it is given."""


def hook(*bases: type, **methods: Callable[..., Any]) -> Any:
    """An instance of a hook with these methods."""
    return type("Mine", bases or (BaseHook,), methods)()


def trainer_class(**methods: Callable[..., Any]) -> Any:
    """A subclass of `BaseTrainer` with these methods and no others."""
    return type("Mine", (BaseTrainer,), methods)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("on_after_steps", "Define `on_after_step(self, trainer)` instead."),
        ("on_befor_step", "Define `on_before_step(self, trainer)` instead."),
        ("on_nonfinite_grad", "Define `on_non_finite_grad(self, trainer, retry)` instead."),
        ("on_train_start", "Define `on_before_train(self, trainer)` instead."),  # Lightning
        ("on_train_batch_end", "Define `on_after_step(self, trainer)` instead."),
        ("on_save_checkpoint", "Define `on_state_dict(self, trainer, state_dict)` instead."),
        ("on_step_end", "Define `on_after_step(self, trainer)` instead."),  # transformers
        ("on_train_epoch_end", "There are no events for epochs, since a run counts steps: use `on_after_step`."),
        ("on_validation_end", "The events are on_before_train, on_before_step, "),
        ("after_step", "Define `on_after_step(self, trainer)` instead."),
        ("state_dict", "Define `on_state_dict(self, trainer, state_dict)` instead."),
    ],
)
def test_a_misspelt_event_is_refused(name: str, remedy: str) -> None:
    """A hook's method that would never be called is named before the first step, with the event that was meant."""
    trainer = SmallTrainer(hooks_=lambda self: [hook(**{name: nothing})])
    message = f"Mine defines `{name}`, which trainloop never calls. {remedy}"
    with pytest.raises(TypeError, match=re.escape(message)):
        trainer.train()
    assert trainer.step == 0


def test_a_misspelt_event_is_found_in_every_class_of_the_hook() -> None:
    """In a base class, in a mixin and in a subclass of one of our hooks."""
    base = type("Base", (BaseHook,), {"on_after_steps": nothing})
    mixin = type("Mixin", (), {"on_train_batch_end": nothing})
    for bases in ((base,), (mixin, BaseHook)):
        with pytest.raises(TypeError, match="which trainloop never calls"):
            check_hook(hook(*bases))
    with pytest.raises(TypeError, match="Define `on_after_step"):
        check_hook(type("Mine", (ProgressHook,), {"on_after_steps": nothing})())


def test_helpers_of_a_hook_are_left_alone() -> None:
    """Other names, a helper beside the event of nearly its name, and methods that another library calls."""
    check_hook(hook(log=nothing, log_images=nothing, measure=nothing, _on_after_steps=nothing))
    check_hook(hook(after_step=nothing, on_after_step=nothing))
    handler = type("FileSystemEventHandler", (), {"on_modified": nothing})
    check_hook(hook(handler, BaseHook, on_modified=nothing))
    module = hook(nn.Module, BaseHook)  # `state_dict` and `load_state_dict` are the module's
    check_hook(module)
    check_hook(type("More", (type(module),), {"state_dict": nothing})())


@pytest.mark.parametrize(
    ("event", "method", "message"),
    [
        ("on_exception", lambda self, trainer: None, "`Mine.on_exception` must take (trainer, exception), but"),
        ("on_non_finite_grad", lambda self: None, "`Mine.on_non_finite_grad` must take (trainer, retry), but"),
        ("on_load_state_dict", lambda self, state: None, "`Mine.on_load_state_dict` must take (trainer, state_dict),"),
    ],
)
def test_an_event_that_cannot_take_its_arguments_is_refused(event: str, method: Any, message: str) -> None:
    """Before the first step, and not when the event comes: at a NaN, at a resume, or in place of another error."""
    with pytest.raises(TypeError, match=re.escape(message)):
        SmallTrainer(hooks_=lambda self: [hook(**{event: method})]).train()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("build_dataloader", "build_data_loader"),
        ("build_scheduler", "build_lr_scheduler"),
        ("build_eval_dataloader", "build_eval_data_loader"),
        ("build_hook", "build_hooks"),
        ("batch_weights", "batch_weight"),
        ("training_step", "forward"),  # Lightning
        ("validation_step", "eval_forward"),
        ("configure_optimizers", "build_optimizer"),
        ("val_dataloader", "build_eval_data_loader"),
        ("compute_loss", "forward"),  # transformers
    ],
)
def test_a_misspelt_method_of_a_trainer_is_refused(name: str, meant: str) -> None:
    """At construction, with the method that was meant; beside that method it is a helper, and is left alone."""
    message = f"Mine defines `{name}`, which trainloop never calls. Define `{meant}` instead."
    with pytest.raises(TypeError, match=re.escape(message)):
        trainer_class(**{name: nothing})(1)
    trainer_class(**{name: nothing, meant: nothing})(1)


def test_helpers_of_a_trainer_are_left_alone() -> None:
    """What factories need is often named `build_…` too."""
    names = ["build_tokenizer", "build_dataset", "build_noise_scheduler", "build_ema_model", "sample", "on_tokens"]
    trainer_class(**dict.fromkeys(names, nothing))(1)


@pytest.mark.parametrize("name", ["on_after_step", "on_train_start", "on_befor_step"])
def test_an_event_on_the_trainer_is_refused(name: str) -> None:
    """Events go to hooks; on a trainer, where Lightning has them, they would never be called."""
    with pytest.raises(
        TypeError, match=f"Mine defines `{name}`, which trainloop never calls on a trainer. Define `on_"
    ):
        trainer_class(**{name: nothing})(1)


def test_a_function_that_cannot_take_its_arguments_is_refused() -> None:
    """`eval_forward` may be called for the first time when the run ends."""
    with pytest.raises(TypeError, match=re.escape("`Mine.eval_forward` must take (self, batch), but is defined as")):
        trainer_class(eval_forward=lambda self: None)(1)
    given: dict[str, Any] = {"model": None, "optimizer": None, "data_loader": [], "max_steps": 1}
    with pytest.raises(TypeError, match=re.escape("`eval_forward` must take (model, batch), but is defined as")):
        Trainer(forward=nothing, eval_forward=lambda batch: None, **given)
    with pytest.raises(TypeError, match=re.escape("`batch_weight` must take (batch), but is defined as")):
        Trainer(forward=nothing, batch_weight=lambda model, batch: 1.0, **given)


class NoSuper(BaseTrainer):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_a_trainer_without_super_init_is_told(method: str) -> None:
    """The error names the call that is missing."""
    with pytest.raises(TypeError, match=re.escape("`NoSuper.__init__` must call `super().__init__(...)`: BaseTrainer")):
        getattr(NoSuper(), method)()


@pytest.mark.parametrize("base", [ProgressHook, CheckpointingHook, EmaHook])
def test_a_hook_without_super_init_is_told(base: type) -> None:
    """Before the first step; a hook that derives from `BaseHook` itself needs no `super().__init__()`."""
    without = type("Mine", (base,), {"__init__": lambda self: None})
    with pytest.raises(
        TypeError, match=re.escape(f"`Mine.__init__` must call `super().__init__(...)`: {base.__name__}")
    ):
        SmallTrainer(hooks_=lambda self: [without()]).train()
    SmallTrainer(hooks_=lambda self: [hook(__init__=lambda self: None)]).train()


def subclasses(cls: type) -> Iterator[type]:
    for one in cls.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_hook_of_ours_stores_an_argument_under_its_name() -> None:
    """That is how `check_hook` sees that its `__init__` has run."""
    package = f"{trainloop.__name__}."
    for info in pkgutil.walk_packages(trainloop.__path__, package):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    public = {cls for cls in subclasses(BaseHook) if not cls.__name__.startswith("_")}  # nobody derives from the others
    ours = {cls for cls in public if cls.__module__.startswith(package) and "__init__" in vars(cls)}
    assert len(ours) > 8
    for cls in ours:
        source = "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
        names = list(inspect.signature(cls).parameters)
        assert any(f"self.{name} = " in source or f"self.{name}: " in source for name in names), cls


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_eval_forward_may_be_static(kind: Any) -> None:
    """It is called on the trainer, where it takes the batch alone."""
    function = (lambda batch: (None, {})) if kind is staticmethod else (lambda cls, batch: (None, {}))
    assert type("Mine", (SmallTrainer,), {"eval_forward": kind(function)})(1).step == 0
