"""The report that is logged when the run is built: processes, strategy, dtypes, sizes, batch, folders, seed."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..ranks import collectives
from ..step.non_finite import clean_name

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_NUM_HOSTS = 4  # number of hosts in the report
_NUM_PARTS = 4


def announce(trainer: BaseTrainer) -> None:
    """Log the report on rank 0. Call on every rank, after model and hooks are built."""
    params = list(trainer.model.parameters())
    local = [p.to_local() if hasattr(p, "to_local") else p for p in params]
    by_rank = collectives.gather_on_first((socket.gethostname(), _count(local), _num_bytes(local)))
    if by_rank is None:
        return
    is_alone = len(by_rank) == 1
    first = f"{_processes([host for host, *_ in by_rank])}: {_strategy(trainer, params)}"
    size = f"{_count(params):,} parameters ({_size(_num_bytes(params))})"
    trainable = _count(p for p in params if p.requires_grad)
    if trainable != _count(params):
        size += f", {trainable:,} trainable"
    if names := trainer._window.modes.names_in_eval_mode:  # without dropout, as in a model from `from_pretrained`
        shown = ", ".join(map(clean_name, names[:_NUM_PARTS]))
        size += f", in eval mode: {shown}{', …' if len(names) > _NUM_PARTS else ''}"
    batch = _batch(trainer, len(by_rank))
    last = f"seed {trainer.seed}{', deterministic' if trainer.deterministic else ''}, {_checkpoints(trainer)}"
    if is_alone:
        trainer.logger.info(f"{first}; {size}, {_dtypes(trainer, params)}\n  {batch}; {last}")
        return
    _, most, most_bytes = max(by_rank, key=lambda row: row[2])
    size += f", at most {most:,} ({_size(most_bytes)}) a rank"
    wrapping = _wrapping(trainer)
    lines = [first, *([wrapping] if wrapping else []), _dtypes(trainer, params), size, batch, last]
    trainer.logger.info("\n  ".join(lines))


def _processes(hosts: list[str]) -> str:
    if len(hosts) == 1:
        return f"1 process on {hosts[0]}"
    counts = Counter(hosts)
    names = [f"{host} {count}" for host, count in list(counts.items())[:_NUM_HOSTS]]
    more = ", …" if len(counts) > _NUM_HOSTS else ""
    where = hosts[0] if len(counts) == 1 else f"{len(counts)} hosts ({', '.join(names)}{more})"
    return f"{len(hosts)} processes on {where}"


def _strategy(trainer: BaseTrainer, params: list[nn.Parameter]) -> str:
    device = trainer.device.type
    if collectives.world_size() == 1:
        return device
    mesh: Any = next((p.device_mesh for p in params if hasattr(p, "device_mesh")), None)
    name = "DDP" if mesh is None else "FSDP2" if mesh.ndim == 1 else "HSDP (FSDP2)"
    if mesh is not None:
        dims = [dim.removesuffix("_cp") for dim in mesh.mesh_dim_names or ("shard",)]  # no context parallelism yet
        name += f", mesh {' x '.join(f'{dim} {size}' for dim, size in zip(dims, mesh.shape, strict=False))}"
    return f"{name}, {device} over {dist.get_backend()}, timeout {collectives.timeout()}"


def _wrapping(trainer: BaseTrainer) -> str:
    """The modules that FSDP2 has wrapped. The parameters of each are gathered and freed together."""
    if not trainer.accelerator.is_fsdp2:
        return ""
    from torch.distributed.fsdp import FSDPModule

    names = [type(m).__name__.removeprefix("FSDP") for m in trainer.model.modules() if isinstance(m, FSDPModule)]
    policy = trainer.accelerator.state.fsdp_plugin.auto_wrap_policy
    by = getattr(getattr(policy, "func", policy), "__name__", "none")
    counts = ", ".join(f"{count} {name}" for name, count in Counter(names).items())
    return f"FSDP2 gathers the weights in {len(names)} parts: {counts} (auto-wrap policy: {by})"


def _dtypes(trainer: BaseTrainer, params: list[nn.Parameter]) -> str:
    master = "/".join(sorted({_name(p.dtype) for p in params}))
    low = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}.get(trainer.accelerator.mixed_precision, master)
    text = f"weights {master}, compute {low}"
    if collectives.world_size() == 1:
        return text
    reduce = master
    if trainer.accelerator.is_fsdp2:
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        reduce = _name(dtype) if (dtype := getattr(policy, "reduce_dtype", None)) is not None else low
    return f"{text}, gradients reduced in {reduce}"


def _batch(trainer: BaseTrainer, world_size: int) -> str:
    own, micro = getattr(trainer.data_loader, "batch_size", None), trainer.gradient_accumulation_steps
    if not isinstance(own, int):
        return f"{micro} micro-batches a step and process"
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    return f"global batch {own * micro * world_size} = {own} a process x {micro} accumulated x {processes}"


def _checkpoints(trainer: BaseTrainer) -> str:
    folders = [str(folder) for hook in trainer.checkpointers if (folder := hook.saves_to(trainer)) is not None]
    return f"checkpoints in {', '.join(folders)}" if folders else "no checkpoints"


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype)[6:])
