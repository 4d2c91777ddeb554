"""Copies the tensors that a rank will write, so that training can continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..content import Content, is_dtensor
from ..format.layout import state_file, tensors_beside, weight_index, weight_index_file
from ..format.limits import MAX_JSON_BYTES
from ..format.nested import Json, encode
from ..format.rules import shard_file
from ..format.tables import STATE, Chunk
from ..format.tensorfile import check_storable
from ..sharding import local_tensor
from .planning import Planner


@dataclass
class Output:
    """One file to write: text, or tensors on the CPU."""

    text: bytes | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Draft:
    """The files that one rank writes."""

    outputs: dict[str, Output] = field(default_factory=dict)
    """By path inside the checkpoint."""
    chunks: dict[str, dict[str, Chunk]] = field(default_factory=dict)
    """By group and name: the parts that this rank writes of tensors without a rule."""
    plan: int = 0
    """Digest of the plan that was used."""
    must_be_finite: dict[str, torch.Tensor] = field(default_factory=dict)
    """The copies of tensors that must be finite, as far as this rank writes them, by full name."""
    wait_for_copies: Callable[[], None] = lambda: None
    """Returns when the tensors have their values. Copies from a device may still be running before that."""
    error: Exception | None = None
    """The error that made it incomplete. It is raised when the ranks vote: if a rank left earlier, the others would
    wait."""


class Buffers:
    """Copies of tensors in CPU memory. The next snapshot uses the memory again, because new memory takes five times as
    long.

    Copies from a device are queued on its current stream, into pinned memory, and the host does not wait for them. Work
    that is queued later runs after them, so training can't change a copy. On a separate stream they could run during
    the next forward pass, and its writes (to BatchNorm's statistics or a codebook) would tear the snapshot.
    """

    def __init__(self) -> None:
        self._held: dict[Any, torch.Tensor] = {}
        self._spare: dict[Any, torch.Tensor] = {}
        self._devices: set[torch.device] = set()

    def start(self) -> None:
        """Begin a snapshot. The memory of the last one may be overwritten now."""
        self._held, self._spare = {}, self._held

    def hold(self, key: Any, tensor: torch.Tensor, copy: bool) -> torch.Tensor:
        """A contiguous copy of `tensor` on the CPU. Its values are complete after a call of `finish`'s result.

        Args:
            key: Key by which the memory is found again.
            tensor: Work that is queued on the device's current stream afterwards may change it.
            copy: False: a contiguous CPU tensor is returned itself, without a copy.
        """
        on_cpu = tensor.device.type == "cpu"
        if not copy and on_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            return tensor
        is_queued = _has_streams(tensor.device)
        buffer = self._spare.pop(key, None)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_queued)
        buffer.copy_(tensor, non_blocking=is_queued)
        if is_queued:
            self._devices.add(tensor.device)
        self._held[key] = buffer
        return buffer

    def finish(self) -> Callable[[], None]:
        """End the snapshot, and free memory that was not used again.

        Returns:
            A function that waits for the copies. Call it on any thread.
        """
        events: list[Any] = []
        for device in self._devices:
            module = torch.get_device_module(device)
            event = module.Event(blocking=True)  # the thread that writes must not spin
            event.record(module.current_stream(device))
            events.append(event)
        self._devices.clear()
        self._spare = {}

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait


def _has_streams(device: torch.device) -> bool:
    if device.type in ("cpu", "meta"):
        return False
    module = torch.get_device_module(device)
    return hasattr(module, "current_stream") and hasattr(module, "Event")


class State:
    """The encoded nested state of this rank and of the run. Its tensors are still live."""

    def __init__(self, content: Content, rank: int) -> None:
        """
        Args:
            content: It contains the state.
            rank: Rank 0 also writes the state of the run.

        Raises:
            TypeError: The state contains something that cannot be stored.
        """
        self.files: dict[str, tuple[Json, dict[str, torch.Tensor]]] = {state_file(rank): encode(content.rank_state)}
        if rank == 0:
            self.files[state_file(None)] = encode(content.global_state)
        for path, (_, tensors) in self.files.items():
            for name, tensor in tensors.items():
                check_storable(f"{path}: {name}", tensor)

    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for _, tensors in self.files.values() for t in tensors.values())


@torch.no_grad()
def take_snapshot(content: Content, state: State, planner: Planner, buffers: Buffers, rank: int, copy: bool) -> Draft:
    """Make the draft of this rank. Call on every rank: DTensors among the weights are gathered, one at a time.

    Args:
        content: The content to save.
        state: Its nested state.
        planner: It has the plan for the content.
        buffers: Memory for the copies.
        rank: This rank.
        copy: Whether the live tensors may change before the draft is written.
    """
    draft = Draft(plan=planner.plan.digest)
    buffers.start()

    def hold(path: str, name: str, tensor: torch.Tensor, full_name: str) -> None:
        if draft.error is None:
            try:
                if path not in draft.outputs:
                    draft.outputs[path] = Output()
                draft.outputs[path].tensors[name] = held = buffers.hold((path, name), tensor, copy)
                if full_name in content.must_be_finite:
                    draft.must_be_finite[full_name] = held
            except Exception as ex:
                draft.error = ex

    plan = planner.plan
    for group, tensors in content.weights.items():
        files = {name: r.chunks[0].file for name, r in plan.tensors[group].items() if r.alias_of is None}
        for name, path in files.items():
            tensor = tensors[name].detach()
            # Gathering is a collective, so it continues even if this rank has failed.
            whole = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
            if plan.weights[group][name] == rank:
                hold(path, name, whole, f"{group}/{name}")
        if rank == 0 and len(set(files.values())) > 1:
            sizes = {name: tensors[name].numel() * tensors[name].element_size() for name in files}
            draft.outputs[weight_index_file(group)] = Output(text=weight_index(files, sizes).encode())

    for group, tensors in content.shards.items():
        if plan.is_cut(group):
            draft.outputs[shard_file(group, rank)] = Output()
        chunks = draft.chunks.setdefault(group, {})
        for piece in planner.pieces[group]:
            local = local_tensor(tensors[piece.name])
            part = local if piece.index is None else local[piece.index]
            hold(piece.chunk.file, piece.name, part, f"{group}/{piece.name}")
            if tuple(part.shape) != piece.chunk.shape:
                draft.error = draft.error or ValueError(
                    f"{group}/{piece.name} has the shape {list(part.shape)} on rank {rank}, but its placements say"
                    f" {list(piece.chunk.shape)}."
                )
            if not plan.tensors[group][piece.name].chunks and plan.tensors[group][piece.name].ruled is None:
                chunks[piece.name] = piece.chunk

    for path, (value, state_tensors) in state.files.items():
        text = json.dumps(value, allow_nan=False).encode()
        if len(text) > MAX_JSON_BYTES:
            draft.error = draft.error or ValueError(
                f"{path} would have {len(text)} bytes, but nested state can have {MAX_JSON_BYTES} at most. Save large"
                " values as tensors."
            )
        draft.outputs[path] = Output(text=text)
        for name, tensor in state_tensors.items():
            hold(tensors_beside(path), name, tensor.detach(), f"{STATE}/{name}")
    try:
        draft.wait_for_copies = buffers.finish()
    except Exception as ex:
        draft.error = draft.error or ex
    return draft
