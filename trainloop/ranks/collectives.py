"""Our collectives, each named after its purpose.

The ranks agree on a few host values, which travel over gloo on the CPU and never wait for the device. In a single
process every function returns at once, from its own argument.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .forks import guard_forks

T = TypeVar("T")

_LAST_SECONDS = 0.2
_LOOK_UP = timedelta(seconds=1)
_PIECE_BYTES = 2**24
_host_groups: dict[Any, Any] = {}
_contact_is_lost: threading.Event | None = None


class LostContactError(RuntimeError):
    """The wait for other ranks was given up, because one of them is known to be gone."""


def world_size() -> int:
    """Number of processes of the run. 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the run. 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def host_group() -> Any:
    """The gloo group for host values, or `None` in a single process.

    The first call creates it, so every rank must make that call. The group is separate even if the run's backend is
    gloo: an asynchronous reduction must not come between those of the gradient.
    """
    if world_size() == 1:
        return None
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups.clear()  # if a process group was destroyed, ours is destroyed with it
        _host_groups[world] = dist.new_group(backend="gloo", timeout=timeout())  # torch's default is not the run's
        atexit.unregister(_end_groups)
        atexit.register(_end_groups)
        guard_forks()
    return _host_groups[world]


def _end_groups() -> None:
    """End gloo's threads before the interpreter ends. A thread that frees a tensor during that end aborts the process,
    and a successful launch fails ("terminate called without an active exception"). No communication.

    This is needed even if the script has ended the groups (`Accelerator.end_training`): a group's threads live as long
    as anybody holds the group, as we do with ours. It is not done after an uncaught exception: a thread may still wait
    for a rank that waits for this one, and the end of the process ends it best.
    """
    if hasattr(sys, "last_value"):
        return
    # Releases the GIL. A thread may need it to free its last tensor, in a group that somebody else holds, as DDP holds
    # the run's group.
    time.sleep(_LAST_SECONDS)
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()
        else:
            for group in _host_groups.values():
                dist.destroy_process_group(group)
    _host_groups.clear()  # the last reference to our group, so this waits for its threads


def timeout() -> timedelta | None:
    """How long a collective of the run waits for a rank. `None` without a process group."""
    if world_size() == 1:
        return None
    world: Any = dist.group.WORLD
    limit: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return limit


def set_timeout(limit: timedelta, model: torch.nn.Module | None = None) -> None:
    """Limit the waiting time of collectives to `limit`: those of the run, those of host values, and those of the device
    meshes of `model`, whose groups get torch's default otherwise. No communication.
    """
    if world_size() == 1:
        return
    params = model.parameters() if model is not None else ()
    meshes: set[Any] = {p.device_mesh for p in params if hasattr(p, "device_mesh")}
    groups = {dist.group.WORLD, *_host_groups.values(), *(group for mesh in meshes for group in mesh.get_all_groups())}
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(limit, group)


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, by rank. Call on every rank. Pickles: for rare paths and small values."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=host_group())
    return gathered


def gather_on_first(value: T) -> list[T] | None:
    """Every rank's `value`, by rank, on rank 0; None on the others. Call on every rank. Pickles."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered, dst=0, group=host_group())
    return gathered


def broadcast_object(value: T) -> T:
    """Rank 0's `value`. Call on every rank. Pickles: for rare paths and small values."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=host_group())
    return box[0]


def start_gather(values: Sequence[int]) -> Callable[[], list[list[int]]]:
    """Start a gather of host integers from all ranks. Call on every rank, with equally many integers.

    This is a gather, not a reduction, because gloo goes around the ring once for a gather and twice for a reduction.

    Returns:
        A function that waits for the other ranks and returns the integers by rank.
    """
    if world_size() == 1:
        return lambda: [list(values)]
    own = torch.tensor(values, dtype=torch.int64)
    gathered = own.new_empty(world_size(), len(values))
    work = dist.all_gather(list(gathered), own, group=host_group(), async_op=True)

    def finish() -> list[list[int]]:
        _wait(work)
        by_rank: list[list[int]] = gathered.tolist()
        return by_rank

    return finish


def end_waits_at(event: threading.Event | None) -> None:
    """End waits of `start_gather` with `LostContactError` when `event` is set. None: don't end them."""
    global _contact_is_lost
    _contact_is_lost = event


def _wait(work: Any) -> None:
    """Wait for an asynchronous collective. In gloo only a dead rank's neighbours in the ring notice its death, so this
    wait also ends when another rank has reported it.
    """
    while True:
        try:
            work.wait(_LOOK_UP)
            return
        except RuntimeError:
            if work.is_completed():  # it has failed, or has completed just now
                work.wait()
                return
        if _contact_is_lost is not None and _contact_is_lost.is_set():
            raise LostContactError("another rank is gone")


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum of host numbers, in double precision. Call on every rank."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=host_group())
    sums: list[float] = tensor.tolist()
    return sums


def share_rank_zero_weights(model: torch.nn.Module, device: torch.device) -> bool:
    """Give every rank the parameters and buffers of rank 0. Returns whether they differed. Call on every rank.

    FSDP2 has no initial broadcast: if the ranks drew different weights, they would build one mixed model. Each rank
    sends one checksum of all its weights. If all are equal, which is the usual case, no weights are sent.
    """
    if world_size() == 1:
        return False
    tensors = [t.detach() for t in [*model.parameters(), *model.buffers()] if not t.is_meta]
    checksums = gather_objects(zlib.crc32(repr([checksum(t) for t in tensors]).encode()))
    if len(set(checksums)) == 1:
        return False
    for tensor in tensors:
        moved = tensor.to(device)
        dist.broadcast(moved, src=0)
        tensor.copy_(moved)
    return True


@torch.no_grad()
def share_rank_zero_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Give every rank the values of rank 0. Call on every rank, with tensors of the same shapes and dtypes."""
    if world_size() == 1:
        return
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).contiguous()
        dist.broadcast(flat.view(torch.uint8), src=0)  # as bytes, because not every backend supports every dtype
        tensor.copy_(flat.view_as(tensor))


def reshard(model: torch.nn.Module) -> None:
    """Free the whole parameters that FSDP2 has gathered. After a forward pass without a backward pass it keeps those of
    the outermost module, and would use them again even if the shards have changed. No communication.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # importing it takes half a second; if it is not imported, nothing is sharded
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def checksum(tensor: torch.Tensor) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and CRC-32 of the bytes. It depends on the order of the bytes, so two permutations differ.

    Takes a second for 3 GiB. A contiguous tensor on the CPU is not copied; one on a device is copied in pieces.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    crc = 0
    for piece in torch.split(raw, _PIECE_BYTES):
        piece = piece.cpu()
        # Not through numpy, because torch may be installed without it.
        crc = zlib.crc32((ctypes.c_char * piece.numel()).from_address(piece.data_ptr()), crc) if piece.numel() else crc
    return tuple(tensor.shape), str(tensor.dtype), crc
