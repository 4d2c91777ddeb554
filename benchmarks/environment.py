"""The environment of a process that is measured."""

from __future__ import annotations

import os
import random
import socket

from .tasks import Task

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
LAYERS = {
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "TransformerEncoderLayer",
}


def environment() -> dict[str, str]:
    """This process's, with one thread a process, and without what Accelerate or a launcher has put there.

    Memory that a process has had stays its own: glibc else hands large blocks back and fetches them again at every
    step, or does not, by where they happen to lie. That is up to a fifth of a step, and no system's merit.
    """
    unwanted = ("ACCELERATE_", "FSDP_", "TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    memory = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    return env | threads | memory | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def environments(task: Task) -> list[dict[str, str]]:
    """One for each rank, as `accelerate launch` and torchrun make them."""
    if not task.is_distributed:
        return [environment()]
    world_size = task.world_size
    common = {
        "ACCELERATE_USE_CPU": str(task.device == "cpu").lower(),
        "TORCHELASTIC_RUN_ID": "benchmark",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    if task.is_sharded:
        common |= FSDP2 | (LAYERS if task.model == "10M transformer" else {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"})
    return [environment() | common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world_size)]


def free_port() -> int:
    """Below the ports that outgoing connections are given, one of which might be taken before rank 0 listens."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)):
                return port
