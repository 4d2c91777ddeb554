"""The state that `forward` changes besides gradients: all buffers, and frozen parameters such as a codebook.

A discarded window, an evaluation and a micro-batch of weight 0 must not leave any such change behind.
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
    """Remembers a model's buffers, and the frozen parameters that `forward` changes, and restores them.

    Costs one copy of the buffers a step. There is no cheaper way to find the buffers that `forward` changes: BatchNorm
    updates its statistics without increasing the tensor's version.

    Args:
        model: The model without its wrappers.
        frozen: A keeper that already knows the model's frozen parameters. None: make one.
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
        """Another keeper of the same model, for use within a window or between two windows."""
        return BufferKeeper(model, self._frozen.fork())

    def follow_trainable(self, model: nn.Module) -> None:
        """Call when other parameters have become frozen or trained."""
        self._frozen = self._frozen.renewed(model)

    def remember(self) -> None:
        """Remember the current value of every buffer."""
        if self._is_first or self._before or any(self._dicts):
            self._remember_buffers()
        if self._frozen.is_needed:
            self._frozen.remember()

    @torch.no_grad()
    def _remember_buffers(self) -> None:
        # The first `forward` may register a module's first buffer. So the first time, all modules are included.
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
        """Restore the values of the last `remember`. This also works if `forward` has replaced, enlarged or registered
        a buffer.
        """
        put_back: dict[int, torch.Tensor] = {}
        for buffer, form, value in zip(self._live, self._forms, self._values, strict=False):
            if form is None:
                put_back[id(buffer)] = value.clone()  # this buffer can't be written to, so the module gets a new tensor
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
        """Inside this context, all changes of the buffers are temporary: they are undone at its end."""
        self.remember()
        try:
            yield
        finally:
            self.restore()


def share_rank_zero_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, on the device. Call on every rank.

    Buffers whose shape differs between ranks are left out, for example a cache that grows with each rank's own data.
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
    """A module's buffers, and the plain attributes that describe them (`self.max_seq_len_cached = 128`)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = dict(module._buffers)
        self._attributes = dict(vars(module))

    def restore(self, put_back: dict[int, torch.Tensor]) -> None:
        """Put the same tensors back into the same slots."""
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
    """The properties that two tensors must share for a copy in place. None: the tensor can't be written to."""
    if tensor.layout is not torch.strided or tensor.is_inference() or tensor.is_quantized:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor. If several of its elements share memory (`expand`): a view of that memory without repetition."""
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
    """Copy a value of the same shape into a tensor, even if several elements of the tensor share memory."""
    memory = memory_of(tensor)
    if memory is tensor:
        tensor.copy_(value)
    else:
        places = torch.arange(memory.numel(), device=memory.device).as_strided(tensor.shape, tensor.stride())
        memory[places.reshape(-1)] = value.to(memory.device, memory.dtype).reshape(-1)


def _num_elements_spanned(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
