"""Checks who computes gradients, and of which parameters. A violation raises at the first step where it happens."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .non_finite import clean_name

_NUM_SHOWN = 4
_LET_GO = ("storage of size 0", "data is not allocated yet")  # on a CPU, on a GPU


class GradientChecks:
    """Checks around a window's backward passes. They read no tensor.

    Args:
        model: The prepared model.
        unwrapped: The model without its wrappers.
    """

    def __init__(self, model: nn.Module, unwrapped: nn.Module) -> None:
        named = [(clean_name(name), param) for name, param in unwrapped.named_parameters()]
        self._trainable = {name: param for name, param in named if param.requires_grad}
        self._frozen = {name: param for name, param in named if not param.requires_grad}
        self._is_first = True
        # With these options DDP accepts parameters without a gradient.
        strict = [ddp for ddp in ddp_modules(model) if not (ddp.find_unused_parameters or ddp.static_graph)]
        reduced = {
            param
            for ddp in strict
            for name, param in ddp.module.named_parameters()
            if name not in ddp.parameters_to_ignore
        }
        self._needed = {name: param for name, param in self._trainable.items() if param in reduced}

    def before_forward(self) -> None:
        """Raise if a frozen parameter now requires grad without a call of `set_trainable`."""
        thawed = [name for name, param in self._frozen.items() if param.requires_grad]
        if thawed:
            raise ValueError(
                f"`requires_grad` of {_listed(thawed)} was set after the model was built. They would be neither reduced"
                " over the ranks by DDP nor averaged by EmaHook. To train them from here on, call"
                " `trainer.set_trainable`."
            )

    def after_forward(self) -> None:
        """Raise if `forward` has left gradients behind. Checks only the first window of the run."""
        if not self._is_first:
            return
        self._is_first = False
        found = [name for name, param in self._trainable.items() if param.grad is not None]
        if found:
            raise ValueError(
                f"`forward` has computed gradients itself: {_listed(found)} had one before the trainer called"
                " `backward`. They would be counted twice. Return the loss and leave `backward` to the trainer; a"
                " gradient that is a part of the loss comes from `torch.autograd.grad`."
            )

    def after_backward(self) -> None:
        """Raise if DDP still waits for gradients. DDP itself would report it only in the next step, less clearly."""
        missing = [name for name, param in self._needed.items() if param.grad is None and param.requires_grad]
        if missing:
            raise ValueError(
                f"{_listed(missing)} got no gradient in this step, but DDP waits for every one, so no rank has the mean"
                " over the ranks. Freeze them in `build_model` (`requires_grad_(False)`), let the loss depend on them"
                " on every rank, or have DDP look for unused parameters in each step: pass"
                " `kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)]`."
            )


def explain_backward(error: RuntimeError) -> None:
    """Raise with a remedy if FSDP2 has freed weights that the backward pass still needs."""
    if any(text in str(error) for text in _LET_GO):
        raise RuntimeError(
            "The backward pass needs weights that FSDP2 has let go of: `forward` has called `torch.autograd.grad` on"
            " what a wrapped module returned, as a gradient penalty does. Have the module keep them: in a hook's"
            " `on_before_train`, call `set_reshard_after_forward(False)` and `set_reshard_after_backward(False)` on it,"
            ' for example on `trainer.model["discriminator"]`. Or train with DDP.'
        ) from error


def ddp_modules(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """The DDP wrappers in a prepared model."""
    return (module for module in model.modules() if isinstance(module, DistributedDataParallel))


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_SHOWN])
    return f"{len(names)} parameters ({shown}{', …' if len(names) > _NUM_SHOWN else ''})"
