"""Checks of a user's own trainer and hooks: methods that trainloop never calls, and a missing `super().__init__()`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from ..errors import check_initialised
from ..hook import EVENTS, BaseHook
from ..recipe import Recipe

_FOREIGN_EVENTS = {
    "on_after_backward": "on_before_optimizer_step",
    "on_batch_begin": "on_before_step",
    "on_batch_end": "on_after_step",
    "on_batch_start": "on_before_step",
    "on_before_zero_grad": "on_after_optimizer_step",
    "on_fit_end": "on_after_train",
    "on_fit_start": "on_before_train",
    "on_load_checkpoint": "on_load_state_dict",
    "on_optimizer_step": "on_after_optimizer_step",
    "on_pre_optimizer_step": "on_before_optimizer_step",
    "on_save_checkpoint": "on_state_dict",
    "on_step_begin": "on_before_step",
    "on_step_end": "on_after_step",
    "on_train_batch_begin": "on_before_step",
    "on_train_batch_end": "on_after_step",
    "on_train_batch_start": "on_before_step",
    "on_train_begin": "on_before_train",
    "on_train_end": "on_after_train",
    "on_train_start": "on_before_train",
    "on_train_step_begin": "on_before_step",
    "on_train_step_end": "on_after_step",
    "on_training_run_end": "on_after_train",
    "on_training_run_start": "on_before_train",
}
"""Events of Lightning, transformers, Keras and pytorch-accelerated, and our corresponding events."""

_FOREIGN_METHODS = {
    "build_callbacks": "build_hooks",
    "build_eval_loader": "build_eval_data_loader",
    "build_val_loader": "build_eval_data_loader",
    "calculate_eval_batch_loss": "eval_forward",
    "calculate_train_batch_loss": "forward",
    "compute_loss": "forward",
    "configure_callbacks": "build_hooks",
    "configure_model": "build_model",
    "configure_optimizers": "build_optimizer",
    "create_optimizer": "build_optimizer",
    "create_scheduler": "build_lr_scheduler",
    "get_eval_dataloader": "build_eval_data_loader",
    "get_train_dataloader": "build_data_loader",
    "prediction_step": "eval_forward",
    "train_dataloader": "build_data_loader",
    "training_step": "forward",
    "val_dataloader": "build_eval_data_loader",
    "validation_step": "eval_forward",
}
"""Methods of other libraries' trainers, and the corresponding methods of `BaseTrainer`."""

_BARE_EVENTS = {
    event.removeprefix("on_"): event
    for event in EVENTS
    if event.startswith(("on_before_", "on_after_")) or event.endswith("state_dict")
}
_RECIPE = [name for name in vars(Recipe) if not name.startswith("_")] + ["build_accelerator"]


def check_trainer_class(cls: type, base: type) -> None:
    """Raise if a trainer's class defines a method that trainloop never calls, but whose name suggests it should.

    A method whose name resembles one of ours, or is known from another library, may be a helper. So it is refused only
    if the class doesn't define our corresponding method.

    Args:
        cls: The class of the trainer.
        base: `BaseTrainer`.

    Raises:
        TypeError: The message names the method and our corresponding one.
    """
    for name in _own_methods(cls, base):
        meant = _FOREIGN_METHODS.get(name) or _nearest(name, _RECIPE, 0.85)
        if name not in _RECIPE and meant and getattr(cls, meant) is getattr(base, meant):
            raise TypeError(
                f"{cls.__name__} defines `{name}`, which trainloop never calls. Define `{meant}` instead. If `{name}`"
                " is a helper of your own, rename it."
            )
        event = name if name in EVENTS else _event_meant(name)
        if event and not issubclass(cls, BaseHook):
            raise TypeError(
                f"{cls.__name__} defines `{name}`, which trainloop never calls on a trainer. Define `{event}` in a"
                " subclass of `BaseHook`, and return an instance of it from `build_hooks`."
            )
    is_static = isinstance(inspect.getattr_static(cls, "eval_forward"), staticmethod | classmethod)
    arguments = ["batch"] if is_static else ["self", "batch"]
    check_call(f"{cls.__name__}.eval_forward", cls.eval_forward, arguments)  # type: ignore[attr-defined]


def check_hook(hook: BaseHook) -> None:
    """Raise for a hook that would not be called, could not be called, or is not initialised.

    Raises:
        TypeError: A method's name resembles an event, or is another library's name of it. Or an event has the wrong
            arguments. Or `__init__` doesn't call that of its base class.
    """
    cls = type(hook)
    for name in _own_methods(cls, BaseHook):
        if name in EVENTS:
            check_call(f"{cls.__name__}.{name}", getattr(hook, name), _arguments(name)[1:])
            continue
        event = _event_meant(name)
        if event is None and not _is_inherited_from_elsewhere(cls, name):  # an nn.Module may have a `state_dict`
            event = _BARE_EVENTS.get(name)
        if event and (name not in _BARE_EVENTS or getattr(cls, event) is getattr(BaseHook, event)):
            advice = f"Define `{event}({', '.join(_arguments(event))})` instead."
        elif event or not name.startswith("on_") or _is_inherited_from_elsewhere(cls, name):
            continue
        elif "epoch" in name:
            advice = "There are no events for epochs, since a run counts steps: use `on_after_step`."
        else:
            advice = f"The events are {', '.join(EVENTS)}."
        raise TypeError(
            f"{cls.__name__} defines `{name}`, which trainloop never calls. {advice} If `{name}` is a helper of your"
            " own, rename it."
        )
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init and _is_ours(base):  # each of our classes stores an argument under its name, perhaps a private one
            arguments = [*inspect.signature(init).parameters]
            check_initialised(hook, [*arguments, *(f"_{name}" for name in arguments)], base.__name__)


def check_call(name: str, function: Any, arguments: list[str]) -> None:
    """Raise unless `function` accepts `arguments` by position. `name` is its name in error messages.

    Python would raise too, but only when it is called, which may be days into the run.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as ex:
        raise TypeError(f"`{name}` must take ({', '.join(arguments)}), but is defined as {signature}: {ex}.") from ex


def _own_methods(cls: type, base: type) -> Iterator[str]:
    """Names of the public methods that the user's classes in `cls` define. `cls` derives from `base`."""
    for one in cls.__mro__:
        if one not in base.__mro__ and not _is_ours(one):
            yield from (name for name, value in vars(one).items() if not name.startswith("_") and callable(value))


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(f"{__name__.split('.')[0]}.")


def _event_meant(name: str) -> str | None:
    """The event that a method of this name was probably meant to be. None: no event is similar."""
    return _FOREIGN_EVENTS.get(name) or (_nearest(name, EVENTS, 0.8) if name.startswith("on_") else None)


def _nearest(name: str, names: Iterable[str], cutoff: float) -> str | None:
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def _is_inherited_from_elsewhere(cls: type, name: str) -> bool:
    """Whether a base class that is no hook has the method too. Then the library of that class calls it."""
    return any(name in vars(base) and not issubclass(base, BaseHook) for base in cls.__mro__)


def _arguments(event: str) -> list[str]:
    return list(inspect.signature(getattr(BaseHook, event)).parameters)
