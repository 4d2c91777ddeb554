"""What real processes count: a short run under FSDP2 with a save and a resume, N processes on this machine.

Each rank counts its open descriptors, its messages, and the files and bytes of the checkpoint. The store of the process
group lives in a process of its own, as under a launcher, and counts the requests to it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainloop import BaseHook, BaseTrainer, CheckpointingHook
from trainloop import trainer as trainer_module
from trainloop.checkpoint import CheckpointStore
from trainloop.checkpoint.disk.fs import FileSystem
from trainloop.checkpoint.format.layout import MANIFEST, TABLES
from trainloop.ranks.links import Links

Counts = dict[str, float]

PRELOADED = ("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp")
"""What a run imports later. A process that is forked from one that has imported it does not import it again."""

_FSDP2 = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "OMP_NUM_THREADS": "1",
}
_WIDTH, _NUM_LAYERS = 256, 8
_NUM_PARAMS = _NUM_LAYERS * _WIDTH * (_WIDTH + 1)
_WARM, _LAST = 2, 6  # the steps between which messages are counted


def enough_descriptors(num_ranks: int) -> int:
    """A limit of open descriptors (`ulimit -n`) under which N ranks train, save and resume on the CPU, if the launch's
    process group connects lazily: 6 for each doubling of N.
    """
    return 6 * log2(num_ranks) + 28


def broken_laws(num_ranks: int, counts: Counts) -> list[str]:
    """Describe each count of a run that is not as it should be."""
    rounds, messages = log2(num_ranks), "messages of trainloop a step"
    limits = {
        "descriptors of trainloop while it trains": 4 * rounds + 9,
        "descriptors of trainloop after an async save": 4 * rounds + 15,
        "MB written in a save": 1.2 * 12 * _NUM_PARAMS / num_ranks / 1e6 + _WIDTH**2 * 4 / 1e6,
    }
    wrong = []
    if counts[messages] != rounds:
        wrong.append(f"{num_ranks} ranks: {messages}: {counts[messages]:g} in place of {rounds}")
    return wrong + [
        f"{num_ranks} ranks: {name}: {counts[name]:,.4g}, but at most {limit:,.4g} are needed"
        for name, limit in limits.items()
        if counts[name] > limit
    ]


def log2(num_ranks: int) -> int:
    """Rounded up."""
    return (num_ranks - 1).bit_length()


def run(num_ranks: int, folder: Path, limit: int | None = None, lazy: bool = True) -> Counts:
    """Train, save and resume with `num_ranks` processes.

    Args:
        num_ranks: Number of processes.
        folder: An empty folder.
        limit: The soft limit of open descriptors of each rank (`ulimit -n`). None: that of this process.
        lazy: Whether to set `TORCH_GLOO_LAZY_INIT=1`, so that the launch's process group connects as ours do.

    Returns:
        What was counted: the largest of all ranks unless the name says otherwise.

    Raises:
        RuntimeError: A rank failed, or did not end.
    """
    for name in PRELOADED:
        __import__(name)
    context = multiprocessing.get_context("fork")
    questions, answers = context.Pipe()
    store = context.Process(target=_serve, args=(answers,), daemon=True)
    store.start()
    env = _FSDP2 | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(questions.recv())}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    env |= {"TORCH_GLOO_LAZY_INIT": "1"} if lazy else {}
    ranks = []
    for rank in range(num_ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        args = (env | {name: str(value) for name, value in own.items()}, folder, limit, store.pid)
        ranks.append(context.Process(target=_rank, args=args, daemon=True))
    try:
        for process in ranks:
            process.start()
        end = time.monotonic() + 300
        while any(process.exitcode is None for process in ranks) and time.monotonic() < end:
            if any(process.exitcode for process in ranks):
                end = min(end, time.monotonic() + 20)  # the others follow
            time.sleep(0.05)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in [*ranks, store]:
            process.kill()
            process.join()
    if any(codes):
        first = next(rank for rank, code in enumerate(codes) if code)
        raise RuntimeError(f"Exit codes {codes}. Rank {first} said:\n{(folder / f'{first}.txt').read_text()[-3000:]}")
    counted = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    newest = max((folder / "checkpoints").glob("step_*"))
    whole: Counts = {
        "bytes of the manifest and its tables": sum((newest / f).stat().st_size for f in (MANIFEST, TABLES))
    }
    for name, of_zero in counted[0].items():
        if name.startswith("CPU"):
            whole[f"{name}, rank 0"] = of_zero
            whole[f"{name}, mean of the ranks"] = mean(counts[name] for counts in counted)
        else:
            whole[name] = max(counts[name] for counts in counted)
    return whole


def _serve(answers: Connection) -> None:
    """Hold the store of the process group until this process is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers.send(store.port)
    while True:
        time.sleep(600)


def _reads(pid: int | str) -> int:
    """How often a process has read from a file or a connection."""
    return _of_io(pid, "syscr")


def _of_io(pid: int | str, name: str) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split(f"{name}:")[1].split()[0])


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # without that of the listing


class _Trainer(BaseTrainer):
    """An MLP of 16 tensors and 2 MB, a checkpoint of which has 6 MB."""

    def __init__(self, folder: Path, max_steps: int, hooks: list[BaseHook]) -> None:
        self._given_hooks = hooks
        super().__init__(max_steps, 1.0, workspace=folder, seed=0, timeout=timedelta(seconds=120))

    def build_data_loader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(1024, _WIDTH)), batch_size=1)

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(_NUM_LAYERS)))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters())

    def build_hooks(self) -> list[BaseHook]:
        return self._given_hooks

    def forward(self, batch: Any) -> Any:
        loss = self.model(batch[0]).square().mean()
        return loss, {}


class _Counter(BaseHook):
    """Counts the messages of the steps after `_WARM`, up to `_LAST`, and what the start has cost."""

    def __init__(self, counts: Counts, num_sent: list[int], store_pid: int) -> None:
        self._counts, self._num_sent, self._store_pid = counts, num_sent, store_pid
        self._requests, self._seconds = _reads(store_pid), time.process_time()
        counts["requests to the store for the launch's process group"] = self._requests
        self._descriptors = _num_descriptors()
        self._writes = 0

    def on_before_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == 1:
            self._counts["requests to the store for trainloop's start"] = _reads(self._store_pid) - self._requests
            self._counts["CPU of trainloop's start, ms"] = (time.process_time() - self._seconds) * 1e3

    def on_after_step(self, trainer: BaseTrainer) -> None:
        if trainer.step == _WARM:
            self._num_sent[0], self._writes = 0, _of_io("self", "syscw")
        if trainer.step == _LAST:
            steps = _LAST - _WARM
            self._counts["messages of trainloop a step"] = self._num_sent[0] / steps
            self._counts["messages of gloo a step, FSDP2's own"] = (_of_io("self", "syscw") - self._writes) / steps
            self._counts["descriptors of trainloop while it trains"] = _num_descriptors() - self._descriptors


def _rank(env: dict[str, str], folder: Path, limit: int | None, store_pid: int) -> None:
    """The function that each process runs."""
    os.environ.update(env)
    rank = env["RANK"]
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.closerange(3, 4096)  # those of the process that forked this one
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counts = {"descriptors before the launch": _num_descriptors()}
    num_sent = [0]
    with _counted_sends(num_sent), _counted_checkpoint(counts, folder / "checkpoints"):
        checkpointing = CheckpointingHook(_LAST + 1, async_save=True)
        trainer = _Trainer(folder, _LAST + 2, [checkpointing])
        dist.barrier()
        counts["descriptors of the launch's process group"] = (
            _num_descriptors() - counts["descriptors before the launch"]
        )
        dist.barrier()  # nobody starts before all have counted
        counter = _Counter(counts, num_sent, store_pid)
        trainer._given_hooks.append(counter)
        trainer.train()
        _Trainer(folder, _LAST + 3, [CheckpointingHook(100)]).train()
    (folder / f"{rank}.json").write_text(json.dumps(counts))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # at once: 32 processes that end one group after the other take long


@contextmanager
def _counted_sends(num_sent: list[int]) -> Iterator[None]:
    """Count the messages over the links."""
    send = Links._send

    def counted(links: Links, *args: Any) -> None:
        num_sent[0] += 1
        send(links, *args)

    Links._send = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Links._send = send  # type: ignore[method-assign]


@contextmanager
def _counted_checkpoint(counts: Counts, checkpoints: Path) -> Iterator[None]:
    """Count what the first async save and the restore of a checkpoint do."""
    num_written, num_opened = [0], [0]
    write, save, restore = FileSystem.write, CheckpointStore.save_async, trainer_module.restore_run

    def counted_write(fs: FileSystem, path: Path, *args: Any, **options: Any) -> None:
        write(fs, path, *args, **options)
        num_written[0] += path.stat().st_size

    def note_open(event: str, args: tuple[Any, ...]) -> None:
        num_opened[0] += event == "open" and isinstance(args[0], str | Path) and str(args[0]).startswith(prefix)

    def counted_save(store: CheckpointStore, *args: Any, **options: Any) -> None:
        with measured("a save"):
            save(store, *args, **options)
            store.wait()
        counts["MB written in a save"] = num_written[0] / 1e6
        counts["descriptors of trainloop after an async save"] = (
            _num_descriptors()
            - counts["descriptors before the launch"]
            - counts["descriptors of the launch's process group"]
        )

    def counted_restore(trainer: BaseTrainer) -> None:
        opened, read = num_opened[0], _of_io("self", "rchar")
        with measured("a load"):
            restore(trainer)
        counts["files opened in a load"] = num_opened[0] - opened
        counts["MB read in a load"] = (_of_io("self", "rchar") - read) / 1e6

    @contextmanager
    def measured(what: str) -> Iterator[None]:
        start = time.process_time()
        yield
        counts[f"CPU of {what}, ms"] = (time.process_time() - start) * 1e3

    prefix = str(checkpoints)
    sys.addaudithook(note_open)
    FileSystem.write, CheckpointStore.save_async = counted_write, counted_save  # type: ignore[method-assign]
    trainer_module.restore_run = counted_restore
    try:
        yield
    finally:
        FileSystem.write, CheckpointStore.save_async = write, save  # type: ignore[method-assign]
        trainer_module.restore_run = restore
