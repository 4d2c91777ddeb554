"""Our collectives, each named after its purpose.

The ranks agree on a few host values, which travel over gloo on the CPU and never wait for the device. In a single
process every function returns at once, from its own argument.
"""

from __future__ import annotations

import atexit
import ctypes
import operator
import os
import pickle
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
from .links import Links, LostContactError
from .tree import merge_to_first

T = TypeVar("T")

_LAST_SECONDS = 0.2
_LAZY = "TORCH_GLOO_LAZY_INIT"
_LOOK_UP = timedelta(seconds=1)
_PIECE_BYTES = 2**24
_host_groups: dict[Any, Any] = {}
_links: Links | None = None
_contact_is_lost: threading.Event | None = None


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
        _host_groups[world] = new_gloo_group(timeout())  # torch's default is not the run's
        atexit.unregister(_end_groups)
        atexit.register(_end_groups)
        guard_forks()
    return _host_groups[world]


def new_gloo_group(limit: timedelta | None) -> Any:
    """Make a gloo group of all ranks for the functions of this module. Call on every rank.

    By default gloo connects every rank to every other one. That takes N-1 descriptors a rank and N^2 requests to rank
    0's store. In this group, a rank connects to about log2 N others.
    """
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        group = dist.new_group(backend="gloo", timeout=limit)
    finally:  # the setting of the script stays in force for its own groups
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before
    # Connect now all ranks that will talk. A broken connection shows at once that a rank has died. A rank that connects
    # only then would wait until the timeout.
    gather_on_first(None, group)
    broadcast_object(None, group)
    dist.all_gather_object([None] * world_size(), None, group=group)
    return group


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


def gather_on_first(value: T, group: Any = None) -> list[T] | None:
    """Every rank's `value`, by rank, on rank 0; None on the others. Call on every rank. Pickles.

    Args:
        value: This rank's.
        group: From `new_gloo_group`; None: the one for host values.
    """
    if world_size() == 1:
        return [value]
    pickled = merge_to_first([pickle.dumps(value)], operator.add, group or host_group())
    return [pickle.loads(one) for one in pickled] if rank() == 0 else None


def merge_over_ranks(value: T, merge: Callable[[T, T], T]) -> T:
    """Merge the values of all ranks. Call on every rank. Pickles.

    The ranks merge along a tree, so each talks to log2 N others at most.

    Args:
        value: This rank's value.
        merge: Merges two values. The first one comes from lower ranks.

    Returns:
        The merged value, the same on every rank.
    """
    if world_size() == 1:
        return value
    return broadcast_object(merge_to_first(value, merge, host_group()))


def broadcast_object(value: T, group: Any = None) -> T:
    """Rank 0's `value`. Call on every rank. Pickles: for rare paths and small values.

    Args:
        value: Of rank 0; those of the others don't matter.
        group: From `new_gloo_group`; None: the one for host values.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group or host_group())
    return box[0]


def gather_ints(values: Sequence[int]) -> list[list[int]]:
    """Gather host integers from all ranks, by rank. Call on every rank, with equally many integers."""
    if world_size() == 1:
        return [list(values)]
    if _links is not None:
        return _links.gather(values, "q")
    own = torch.tensor(values, dtype=torch.int64)
    gathered = own.new_empty(world_size(), len(values))
    dist.all_gather(list(gathered), own, group=host_group())
    by_rank: list[list[int]] = gathered.tolist()
    return by_rank


def start_max(values: Sequence[int]) -> Callable[[], list[int]]:
    """Start to find the maximum over all ranks of each host integer. Call on every rank, with equally many integers.

    Over links this starts at once and takes log2 N messages a rank. Without links, gloo goes around its ring twice.

    Returns:
        A function that waits for the other ranks and returns the maxima.
    """
    if world_size() == 1:
        own = list(values)
        return lambda: own
    if _links is not None:
        return _links.start(values)
    maxima = torch.tensor(values, dtype=torch.int64)
    work = dist.all_reduce(maxima, dist.ReduceOp.MAX, host_group(), async_op=True)

    def finish() -> list[int]:
        _wait(work)
        found: list[int] = maxima.tolist()
        return found

    return finish


def is_same_on_ranks(number: int) -> bool:
    """Whether all ranks pass the same number. Call on every rank."""
    return start_max([number, -number])() == [number, -number]


def use_links(links: Links | None) -> None:
    """Have `start_max` use these connections from now on, and close those that it has used so far. None: use gloo."""
    global _links
    if _links is not None:
        _links.close()
    _links = links


def end_waits_at(event: threading.Event | None) -> None:
    """End waits of `start_max` with `LostContactError` when `event` is set. None: don't end them."""
    global _contact_is_lost
    _contact_is_lost = event


def contact_is_lost() -> bool:
    """Whether a rank is known to be gone, so that it is useless to wait for others."""
    return _contact_is_lost is not None and _contact_is_lost.is_set()


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
        if contact_is_lost():
            raise LostContactError("another rank is gone")


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum of host numbers, in double precision. Call on every rank."""
    if world_size() == 1:
        return list(values)
    if _links is not None:
        return [sum(column) for column in zip(*_links.gather(values, "d"), strict=True)]  # the same bits on every rank
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
