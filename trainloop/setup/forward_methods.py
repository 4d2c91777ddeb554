"""Methods of the model that `forward` may call on `self.model`, besides the model itself.

DDP and FSDP2 only handle calls of the model. If a method is called directly (`self.unwrapped_model.encode(x)`), DDP
doesn't reduce its gradients, and FSDP2 doesn't gather its weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import convert_to_fp32, get_mixed_precision_context_manager
from torch import nn

from ..errors import describe
from ..step.gradient_checks import ddp_modules
from ..step.models import modules_of


def add_forward_methods(
    accelerator: Accelerator, model: nn.Module, prepared: nn.Module, names: Iterable[str], returns_fp32: bool
) -> None:
    """Make methods of `model` callable on `prepared`. Such a call does everything that a call of the model does.

    Args:
        accelerator: The accelerator that has prepared the model.
        model: The model without its wrappers.
        prepared: The model with its wrappers.
        names: Names of the methods.
        returns_fp32: Whether the prepared model casts its output back to fp32, under FSDP2.
    """
    for name in names:
        lowered = partial(_in_autocast, model, name, accelerator.autocast_handler)
        if accelerator.is_fsdp2:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(model, name)
            if returns_fp32:
                setattr(model, name, partial(_cast, getattr(model, name)))
            continue
        for ddp in ddp_modules(prepared):
            method = lowered if accelerator.native_amp else getattr(model, name)
            setattr(ddp, name, partial(_through_ddp, ddp, method))
        if prepared is model and accelerator.native_amp:
            setattr(model, name, lowered)


def check_forward_methods(model: nn.Module, names: Any) -> list[str]:
    """The names, including those in the attribute `forward_methods` of the model itself."""
    modules = modules_of(model)
    given: list[str] = []
    for some in (names, *(getattr(module, "forward_methods", ()) for module in modules)):
        if isinstance(some, str) or not isinstance(some, Iterable):
            raise TypeError(f"`forward_methods` must be a tuple of names, but is {describe(some)}.")
        given += [name for name in some if name not in given]
    for name in given:
        if not any(callable(getattr(module, name, None)) for module in modules):
            raise ValueError(f"`forward_methods` names {name!r}, but {type(model).__name__} has no such method.")
    return given


def _in_autocast(module: nn.Module, name: str, options: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a method in the way that Accelerate calls `forward` in mixed precision. The module is an argument of a
    `partial`, so that a copy of the module calls the copy's method.
    """
    with get_mixed_precision_context_manager(True, options):
        output = getattr(type(module), name)(module, *args, **kwargs)
    return convert_to_fp32(output)


def _cast(method: Any, *args: Any, **kwargs: Any) -> Any:
    return convert_to_fp32(method(*args, **kwargs))


def _through_ddp(ddp: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Call DDP with the method temporarily in place of the model's `forward`."""
    module = ddp.module
    own = vars(module).get("forward")  # Accelerate's wrapper, in mixed precision

    def give_back() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    def redirected(*args: Any, **kwargs: Any) -> Any:
        give_back()  # the method may call `forward` itself
        return method(*args, **kwargs)

    module.forward = redirected
    try:
        return ddp(*args, **kwargs)
    finally:
        give_back()
