"""What `forward` changes besides gradients: buffers of every kind, and frozen parameters such as a codebook.

A discarded window, an evaluation and a micro-batch of weight 0 must leave none of it behind.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..ranks import collectives
from .frozen import FrozenKeeper

_PLAIN = (int, float, bool, str, type(None))


class BufferKeeper:
    """Keeps a model's buffers, and the frozen parameters that `forward` changes, as they were before a window.

    Costs one copy of the buffers a step. Which of them `forward` changes can't be told more cheaply: BatchNorm updates
    its statistics without counting up the tensor's version.

    Args:
        model: The model without its wrappers.
        frozen: What is known of the model's frozen parameters. None: nothing yet.
    """

    def __init__(self, model: nn.Module, frozen: FrozenKeeper | None = None) -> None:
        self._frozen = frozen if frozen is not None else FrozenKeeper(model)
        self._modules = list(model.modules())
        self._dicts = [module._buffers for module in self._modules]
        self._is_first = True
        self._before: list[_Before] = []
        self._live: list[torch.Tensor] = []
        self._forms: list[Any] = []
        self._values: list[torch.Tensor] = []

    def fork(self, model: nn.Module) -> BufferKeeper:
        """Another keeper of the same model, for use within a window or between two."""
        return BufferKeeper(model, self._frozen.fork())

    def remember(self) -> None:
        """Take note of every buffer's present value."""
        if self._is_first or self._before or any(self._dicts):
            self._remember_buffers()
        if self._frozen.is_needed:
            self._frozen.remember()

    @torch.no_grad()
    def _remember_buffers(self) -> None:
        # The first `forward` may register the first buffer of a module; from then on it is one that has buffers.
        pairs = zip(self._modules, self._dicts, strict=True)
        self._before = [_Before(module) for module, buffers in pairs if buffers or self._is_first]
        self._is_first = False
        self._live = [b for before in self._before for b in before.buffers.values() if b is not None]
        if self._live:
            forms = [form_of(buffer) for buffer in self._live]
            if forms == self._forms and all(forms):
                torch._foreach_copy_(self._values, [memory_of(buffer) for buffer in self._live])
            else:
                self._forms, self._values = forms, [memory_of(buffer).detach().clone() for buffer in self._live]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `remember` saw, also where `forward` has put another tensor in a buffer's place, has grown it,
        or has registered a new one.
        """
        put_back: dict[int, torch.Tensor] = {}
        for buffer, form, value in zip(self._live, self._forms, self._values, strict=False):
            if form is None:
                put_back[id(buffer)] = value.clone()  # not to be written into: the module gets another one
            elif form_of(buffer) == form:
                memory_of(buffer).copy_(value)
            else:
                buffer.set_(value.clone())  # type: ignore[call-overload]
        known = {id(before.module) for before in self._before}
        for before in self._before:
            before.restore(put_back)
        for module in self._modules:
            if id(module) not in known:
                module._buffers.clear()
        self._frozen.restore()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it, whatever happens to the buffers is undone at the end."""
        self.remember()
        try:
            yield
        finally:
            self.restore()


def share_rank_zero_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, on the device. Call on every rank.

    Left out are those that have not the same shape everywhere, as a cache that grows with each rank's own data.
    """
    if collectives.world_size() == 1:
        return
    named = {name: buffer for name, buffer in model.named_buffers() if form_of(buffer) is not None}
    forms = {name: f"{tuple(buffer.shape)} {buffer.stride()} {buffer.dtype}" for name, buffer in named.items()}
    if len(set(collectives.gather_objects(zlib.crc32(repr(forms).encode())))) > 1:
        by_rank = collectives.gather_objects(forms)
        named = {n: b for n, b in named.items() if all(other.get(n) == forms[n] for other in by_rank)}
        named = {name: named[name] for name in by_rank[0] if name in named}
    collectives.share_rank_zero_tensors([memory_of(buffer) for buffer in named.values()])


class _Before:
    """A module's buffers, and the plain attributes that say what they hold (`self.max_seq_len_cached = 128`)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = dict(module._buffers)
        self._attributes = dict(vars(module))

    def restore(self, put_back: dict[int, torch.Tensor]) -> None:
        """The same tensors in the same slots."""
        live = self.module._buffers
        if live.keys() != self.buffers.keys() or any(live[key] is not self.buffers[key] for key in live):
            self._restore_attributes()
        live.clear()
        live.update({key: put_back.get(id(buffer), buffer) for key, buffer in self.buffers.items()})

    def _restore_attributes(self) -> None:
        attributes = vars(self.module)
        for name in [name for name, value in attributes.items() if type(value) in _PLAIN]:
            if name not in self._attributes:
                del attributes[name]
            elif type(self._attributes[name]) in _PLAIN:
                attributes[name] = self._attributes[name]


def form_of(tensor: torch.Tensor) -> Any:
    """What must be the same for one tensor to be copied into the other; None: it cannot be written into."""
    if tensor.layout is not torch.strided or tensor.is_inference() or tensor.is_quantized:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or, where several of its elements are the same memory (`expand`), that memory once."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return tensor
    end = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < end:
                return tensor.as_strided((_num_elements_spanned(tensor),), (1,))
            end = (size - 1) * stride + end
    return tensor


@torch.no_grad()
def write_into(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a value of the same shape, also where several elements are the same memory."""
    memory = memory_of(tensor)
    if memory is tensor:
        tensor.copy_(value)
    else:
        places = torch.arange(memory.numel(), device=memory.device).as_strided(tensor.shape, tensor.stride())
        memory[places.reshape(-1)] = value.to(memory.device, memory.dtype).reshape(-1)


def _num_elements_spanned(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
