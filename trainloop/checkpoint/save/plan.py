"""Decides which rank writes which part of which tensor. Every rank computes the same plan, without communication.

All ranks should write about the same number of bytes. If several ranks have a copy, the one with the least to do
writes it. A tensor that is a large share of a rank's bytes is cut along its first dimension, so that all ranks with a
copy write a part. Two things can't be shared: a shard that a single rank has, and a whole weight, which is in one file
so that other software can read it.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..content import Described
from ..format.dtypes import DTYPES
from ..format.layout import weight_file
from ..format.rules import Cut, Rule, shard_file
from ..format.tables import Chunk, RankFiles, TensorRecord
from ..placement import Layout, replicated

Aliases: TypeAlias = Mapping[str, Mapping[str, str]]
"""By group: names of tensors that are stored under another name, each with that name."""
_Name: TypeAlias = "tuple[str, str]"
"""Group and name of a tensor."""
_MAX_SHARE = 0.2
"""A replicated tensor that is larger than this share of a rank's mean bytes is cut."""
_FEW = 16
"""Tensors with at most this many elements are written by rank 0, for example the optimizer's step counters. If they
were spread over the ranks, each rank would have to open every file when it loads.
"""


@dataclass(frozen=True)
class Plan:
    """Which rank writes what.

    Attributes:
        tensors: By group and name. A record without parts belongs to a tensor that no rule can describe. Then each rank
            that is the first to have a part writes that part.
        weights: By group: the names of the weights, and the rank that writes each.
        num_bytes: For each rank, about how many bytes of tensors it writes.
        digest: The same number on ranks with the same plan.
    """

    tensors: dict[str, dict[str, TensorRecord]]
    weights: dict[str, dict[str, int]]
    num_bytes: list[int]
    digest: int

    def is_cut(self, group: str) -> bool:
        """Whether a rule describes tensors of a group. Then each rank has a file in the group, perhaps an empty one."""
        return any(record.ruled is not None for record in self.tensors[group].values())


def make_plan(
    described: Described,
    weights: Collection[str],
    aliases: Aliases,
    of_rank_zero: Collection[str],
    irregular: Collection[_Name],
    world_size: int,
) -> Plan:
    """Make the plan.

    Args:
        described: The tensors by group and name.
        weights: The groups of whole tensors.
        aliases: Tensors that are stored under another name.
        of_rank_zero: Weights that rank 0 writes.
        irregular: Group and name of tensors whose parts are not where their layout says.
        world_size: Number of ranks.
    """
    stored = {group: {n: t for n, t in ts.items() if n not in aliases[group]} for group, ts in described.items()}
    total = sum(_num_bytes(dtype, shape) for tensors in stored.values() for dtype, shape, _ in tensors.values())
    mean = total / world_size
    loads = [0] * world_size
    by_layout: dict[Layout, list[_Shard]] = defaultdict(list)
    for group, named in stored.items():
        for name, (dtype, shape, layout) in named.items() if group not in weights else ():
            if 0 not in shape and (layout is None or not layout.irregular) and (group, name) not in irregular:
                shard = _Shard(group, name, TensorRecord(dtype, shape))
                by_layout[layout if layout is not None else replicated(world_size)].append(shard)
    # In this order: tensors that only one rank has, then whole weights, then those that may go to any of several ranks.
    planned: dict[_Name, TensorRecord] = {}
    for layout, items in by_layout.items():
        if None not in layout.shards:
            planned |= _share(items, layout, _MAX_SHARE * mean, loads)
    sizes = {(g, name): _num_bytes(d, s) for g in weights for name, (d, s, _) in stored[g].items()}
    of_zero = {(group, name) for group, name in sizes if name in of_rank_zero}
    assigned = _assign(sizes, of_zero, mean, loads)
    for layout, items in by_layout.items():
        if None in layout.shards:
            planned |= _share(items, layout, _MAX_SHARE * mean, loads)
    writers = {group: {name: assigned[group, name] for name in stored[group]} for group in weights}
    tensors: dict[str, dict[str, TensorRecord]] = {}
    for group, named in stored.items():
        if group in weights:
            files = _weight_files(group, writers[group])
            tensors[group] = {n: _whole(d, s, files[n], n) for n, (d, s, _) in named.items()}
        else:
            tensors[group] = {n: planned.get((group, n), TensorRecord(d, s)) for n, (d, s, _) in named.items()}
    for group, same in aliases.items():
        tensors[group] |= {name: replace(tensors[group][kept], alias_of=kept) for name, kept in same.items()}
        tensors[group] = {name: tensors[group][name] for name in described[group]}
    return Plan(tensors, writers, loads, zlib.crc32(repr((tensors, writers)).encode()))


@dataclass(frozen=True)
class _Shard:
    """A tensor of a group of shards."""

    group: str
    name: str
    record: TensorRecord


def _share(items: Sequence[_Shard], layout: Layout, limit: float, loads: list[int]) -> dict[_Name, TensorRecord]:
    """Distribute tensors with the same layout over the replicas.

    Args:
        items: The tensors.
        layout: Their layout.
        limit: Limit in bytes for a rank's part. A larger part is cut if other ranks have it too.
        loads: Bytes of each rank. The bytes of the tensors are added.
    """
    dims = list(zip(layout.sizes, layout.strides, layout.shards, strict=True))
    copies = [(size, stride) for size, stride, dim in dims if dim is None]
    num_replicas = math.prod(size for size, _ in copies)
    replicas: list[list[int]] = [[] for _ in range(num_replicas)]
    for rank in range(len(loads)):
        index = 0
        for size, stride in copies:
            index = index * size + rank // stride % size
        replicas[index].append(rank)
    added = [0] * num_replicas
    records: dict[_Name, TensorRecord] = {}
    open_items = []
    for item in items:
        shape, extent = item.record.shape, list(item.record.shape)
        cuts = []
        for size, stride, dim in dims:
            if dim is not None:
                extent[dim] = -(-extent[dim] // size)
                cuts.append(Cut(dim, extent[dim], stride))
        num_bytes = _num_bytes(item.record.dtype, extent)
        if num_replicas > 1 and num_bytes > limit and shape and extent[0] > 1 and math.prod(shape) > _FEW:
            for size, stride in copies:
                extent[0] = -(-extent[0] // size)
                cuts.append(Cut(0, extent[0], stride))
            num_parts = -(-num_bytes // max(1, _num_bytes(item.record.dtype, extent)))
            for index in range(min(num_parts, num_replicas)):
                added[index] += _num_bytes(item.record.dtype, extent)
            records[item.group, item.name] = _cut(item, 0, cuts)
        elif num_replicas == 1 or math.prod(shape) <= _FEW:
            added[0] += num_bytes
            records[item.group, item.name] = _cut(item, 0, cuts)
        else:
            open_items.append((num_bytes, item, cuts))
    heap = [(added[i] + max(loads[rank] for rank in ranks), i) for i, ranks in enumerate(replicas)]
    heapq.heapify(heap)
    for num_bytes, item, cuts in sorted(open_items, key=lambda open_item: -open_item[0]):
        load, index = heap[0]
        heapq.heapreplace(heap, (load + num_bytes, index))
        added[index] += num_bytes
        records[item.group, item.name] = _cut(item, min(replicas[index]), cuts)
    for index, ranks in enumerate(replicas):
        for rank in ranks:
            loads[rank] += added[index]
    return records


def _cut(item: _Shard, first: int, cuts: Iterable[Cut]) -> TensorRecord:
    """The record of a tensor. Rank `first` writes its first part."""
    dtype, shape = item.record.dtype, item.record.shape
    cuts = tuple(cut for cut in cuts if cut.rows < shape[cut.dim])
    if not cuts:
        return _whole(dtype, shape, shard_file(item.group, first), item.name)
    return TensorRecord(dtype, shape, ruled=RankFiles(Rule(first, cuts), item.group, item.name))


def _assign(
    sizes: Mapping[_Name, int], of_rank_zero: Collection[_Name], mean: float, loads: list[int]
) -> dict[_Name, int]:
    """Choose the rank that writes each whole tensor: the largest tensor first, each by the rank with the least to do.

    Only as many ranks take part as are needed. The others stay free for replicated shards.

    Args:
        sizes: Bytes of the tensors.
        of_rank_zero: The tensors that rank 0 writes.
        mean: Mean number of bytes per rank in the whole save.
        loads: Bytes of each rank. The bytes of the tensors are added.
    """
    writers = {name: 0 for name in sizes if name in of_rank_zero}
    loads[0] += sum(sizes[name] for name in writers)
    room, needed = 0.0, sum(min(size, mean) for name, size in sizes.items() if name not in writers)
    heap: list[tuple[int, int]] = []
    spare = iter(range(len(loads)))
    for rank in spare:
        heapq.heappush(heap, (loads[rank], rank))
        room += max(0.0, mean - loads[rank])
        if room >= needed:
            break
    for name in sorted((name for name in sizes if name not in writers), key=lambda name: -sizes[name]):
        if heap[0][0] + sizes[name] > (1 + _MAX_SHARE) * mean and (another := next(spare, None)) is not None:
            heapq.heappush(heap, (loads[another], another))
        load, rank = heap[0]
        heapq.heapreplace(heap, (load + max(sizes[name], 1), rank))
        loads[rank] += sizes[name]
        writers[name] = rank
    return writers


def _weight_files(group: str, writers: Mapping[str, int]) -> dict[str, str]:
    """The file of each whole tensor. The parts are numbered in the order of the ranks that write them."""
    parts = {rank: part for part, rank in enumerate(sorted(set(writers.values())))}
    return {name: weight_file(group, parts[rank], len(parts)) for name, rank in writers.items()}


def _whole(dtype: str, shape: tuple[int, ...], path: str, name: str) -> TensorRecord:
    return TensorRecord(dtype, shape, (Chunk(path, name, (0,) * len(shape), shape),))


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
