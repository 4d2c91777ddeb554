"""Reports what filled the memory when it ran out: the step, the shapes of the batch, the largest tensors."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.tools.report import size
from ..step.window import Window

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_MAX_TENSORS = 30
_MAX_SHAPES = 50


def out_of_memory_error(exception: BaseException | None) -> torch.OutOfMemoryError | None:
    """The exception itself, or the one that caused it. None: memory did not run out."""
    seen: set[int] = set()
    while exception is not None and id(exception) not in seen:
        if isinstance(exception, torch.OutOfMemoryError):
            return exception
        seen.add(id(exception))
        exception = exception.__cause__ or exception.__context__
    return None


def memory_report(trainer: BaseTrainer, error: torch.OutOfMemoryError, exception: BaseException, step: int) -> str:
    """This rank's report. Call this while the error's frames still hold the tensors.

    Args:
        trainer: The trainer.
        error: The error.
        exception: The exception that leaves `train`: `error`, or one that `error` caused.
        step: The step in which `error` was raised.
    """
    device = trainer.device
    lines = [f"Memory ran out in step {step}, on rank {trainer.accelerator.process_index} ({device}): {_first(error)}"]
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    if place:
        lines.append(f"Raised at {place[-1].filename}:{place[-1].lineno}, in {place[-1].name}: {place[-1].line}")
    lines += ["", "The micro-batch:"]
    batch = _batch_of(exception.__traceback__)
    shapes = list(_shapes("batch", batch[0])) if batch else ["none: it was not raised in forward or backward"]
    lines += [f"  {shape}" for shape in shapes[:_MAX_SHAPES]]
    if len(shapes) > _MAX_SHAPES:
        lines.append(f"  and {len(shapes) - _MAX_SHAPES} more")
    named = _named(trainer)
    names = {id(tensor): name for name, tensor in named}
    tensors = _tensors_on(device, [tensor for _, tensor in named])
    total = sum(num_bytes for num_bytes, _ in tensors)
    lines += ["", f"The largest tensors, of {len(tensors)} that Python knows ({size(total)}):"]
    for num_bytes, tensor in tensors[:_MAX_TENSORS]:
        shape = " x ".join(map(str, tensor.shape)) or "a number"
        what = names.get(id(tensor), "")
        lines.append(f"  {size(num_bytes):>10}  {shape}, {str(tensor.dtype).removeprefix('torch.')}  {what}".rstrip())
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        lines += [
            "",
            f"Allocated are {size(allocated)}, reserved {size(reserved)}. What Python does not know, about"
            f" {size(max(0, allocated - total))}, is mostly held for the backward pass: activations.",
            "",
            torch.cuda.memory_summary(device),
        ]
    return "\n".join(lines) + "\n"


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _batch_of(trace: TracebackType | None) -> list[Any]:
    """The micro-batch that was being computed, from the frame of the window. Empty: there was none."""
    while trace is not None:
        if trace.tb_frame.f_code is Window.run.__code__ and "batch" in trace.tb_frame.f_locals:
            return [trace.tb_frame.f_locals["batch"]]
        trace = trace.tb_next
    return []


def _shapes(name: str, value: Any) -> Iterator[str]:
    """A line for each tensor or array in nested containers."""
    if isinstance(value, torch.Tensor) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        shape = " x ".join(map(str, value.shape)) or "a number"
        yield f"{name}: {shape}, {str(value.dtype).removeprefix('torch.')}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _shapes(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _shapes(f"{name}[{i}]", item)
    else:
        yield f"{name}: {type(value).__name__}"


def _tensors_on(device: torch.device, known: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    """The tensors that Python knows on a type of device, the largest first. Tensors that share memory count once.

    Args:
        device: A device of the type.
        known: The tensors whose name is known. Each is listed instead of others with the same memory.
    """
    found: dict[int, tuple[int, torch.Tensor]] = {}
    for value in [*known, *gc.get_objects()]:
        if not issubclass(type(value), torch.Tensor):  # `isinstance` would run code of proxy objects
            continue
        try:
            if value.device.type != device.type:
                continue
            storage = (value.to_local() if hasattr(value, "to_local") else value).untyped_storage()
            place, num_bytes = storage.data_ptr(), storage.nbytes()
        except (NotImplementedError, RuntimeError):  # it has no memory
            continue
        if num_bytes:
            found.setdefault(place, (num_bytes, value))
    return sorted(found.values(), key=lambda pair: -pair[0])


def _named(trainer: BaseTrainer) -> list[tuple[str, torch.Tensor]]:
    """The tensors of the run with their names."""
    named: list[tuple[str, Any]] = list(trainer.unwrapped_model.named_buffers())
    for name, parameter in trainer.named_parameters().items():
        named += [(name, parameter), (f"gradient of {name}", parameter.grad)]
        state = trainer._raw_optimizer.state.get(parameter, {})
        named += [(f"optimizer: {key} of {name}", value) for key, value in state.items()]
    return [(name, tensor) for name, tensor in named if isinstance(tensor, torch.Tensor)]
