"""Saves and loads checkpoints on several ranks, and makes ranks fail, one scenario after another in one launch.

Usage: accelerate launch checkpoint_store.py save|load|failures FOLDER FORM
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainloop import CheckpointError
from trainloop.checkpoint import Checkpoint, CheckpointStore, Content, FileSystem, KeepInterval, KeepPrevious
from trainloop.checkpoint.newest import find_newest
from trainloop.ranks import collectives
from trainloop.state.optimizer import optimizer_state

STEP = 7
ABOUT: dict[str, Any] = {"run_id": "run"}


# ---------------------------------------------------------------------- what is saved


class Net(nn.Module):
    """Tied weights, a parameter with fewer rows than there are ranks, one that never has a gradient, odd buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.hidden = nn.Linear(6, 5)
        self.one = nn.Linear(6, 1)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(7, 2))
        self.out = nn.Linear(6, 13)
        self.out.weight = self.embedding.weight
        self.register_buffer("num_seen", torch.tensor(2**40))
        self.register_buffer("brain", torch.zeros(9, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embedding(x)
        return (self.out(y).sum() + self.one(y).sum() + self.hidden(y).sum()) * 0.1


def value(name: str, like: torch.Tensor) -> torch.Tensor:
    """What the whole tensor of this name holds: any bits, NaN among them; depends on the name only."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1000 + len(name))
    if like.dtype == torch.bool:
        return torch.randint(0, 2, like.shape, generator=generator).bool()
    size = like.element_size()
    raw = torch.randint(0, 256, (*like.shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(like.dtype).reshape(like.shape)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


@torch.no_grad()
def put(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Set a tensor, which may be a DTensor, to `full`."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(full)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, and what they mean."""
    tensor = tensor.detach().contiguous()
    raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    return f"{tensor.dtype} {list(tensor.shape)} ".encode() + bytes(raw.tolist())


def build(form: str, with_optimizer_state: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A wrapped model's tensors and its optimizer's, live, by name; what they hold is arbitrary."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    torch.manual_seed(0)
    plain = model = Net()
    if form.startswith("ddp"):
        model = nn.parallel.DistributedDataParallel(plain, find_unused_parameters=True)
    elif form != "single":
        from torch.distributed.fsdp import fully_shard

        mesh = mesh_of(form)
        fully_shard(plain.hidden, mesh=mesh)
        fully_shard(plain, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.0)
    if with_optimizer_state:
        model(torch.arange(13)).backward()
        optimizer.step()
    state = optimizer_state(plain, optimizer)["state"]
    flat = {f"{name}/{key}": tensor for name, entry in state.items() for key, tensor in entry.items()}
    return get_model_state_dict(model), flat | sharded_otherwise(form)


def mesh_of(form: str) -> Any:
    """The ranks as FSDP2 lays them out; HSDP has replicas of shards."""
    from torch.distributed.device_mesh import init_device_mesh

    if form == "hsdp2x2":
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (collectives.world_size(),))


def sharded_otherwise(form: str) -> dict[str, torch.Tensor]:
    """Tensors as tensor parallelism lays them out: by columns, and whole on each rank."""
    shapes = {"columns": (4, 5), "few_columns": (3, 1), "vector": (11,), "none": (0, 3)}
    if form == "single":
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
    from torch.distributed.tensor import Replicate, Shard, zeros

    mesh = mesh_of(form)
    placements = {"columns": Shard(1), "few_columns": Shard(1), "vector": Replicate(), "none": Shard(0)}
    return {
        name: zeros(shape, device_mesh=mesh, placements=[Replicate()] * (mesh.ndim - 1) + [placements[name]])
        for name, shape in shapes.items()
    }


# ---------------------------------------------------------------------- save and load


def save(folder: Path, form: str) -> None:
    """Save, both ways, what `value` says."""
    model, optim = build(form, with_optimizer_state=True)
    for tensors in (model, optim):
        for name, tensor in tensors.items():
            put(tensor, value(canonical(name), tensor))
    content = Content(
        {"model": model}, {"optim": optim}, {"saved by": form}, {"rank": collectives.rank(), "x": torch.arange(3)}
    )
    store = CheckpointStore(folder / form)
    store.open()
    store.save(STEP, content, run_id=form)
    store.save_async(STEP + 1, content, run_id=form, retention=[KeepPrevious(1)])
    for tensors in (model, optim):
        for tensor in tensors.values():
            put(tensor, torch.zeros_like(whole(tensor)))  # as if training went on
    store.close()


def load(folder: Path, form: str) -> None:
    """Load what each form has saved, and compare every bit."""
    model, optim = build(form, with_optimizer_state=False)
    for saved_by in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        for step in (STEP, STEP + 1):
            checkpoint = CheckpointStore(folder / saved_by).resolve(step)
            assert checkpoint is not None
            targets = {**optim_like(checkpoint, model), **optim}
            for group, tensors in (("model", model), ("optim", targets)):
                for tensor in tensors.values():
                    put(tensor, torch.zeros_like(whole(tensor)) + 1)
                checkpoint.read_into(group, tensors)
                for name, tensor in tensors.items():
                    got = whole(tensor)
                    assert bits(got) == bits(value(canonical(name), got)), (saved_by, form, step, group, name)
            assert checkpoint.global_state() == {"saved by": saved_by}
            rank_state = checkpoint.rank_state(collectives.rank())
            if checkpoint.manifest.world_size == collectives.world_size():
                assert rank_state["rank"] == collectives.rank()
                assert rank_state["x"].tolist() == [0, 1, 2]
            else:
                assert rank_state is None


def canonical(name: str) -> str:
    """Tied tensors hold the same."""
    return name.replace("out.weight", "embedding.weight")


def optim_like(checkpoint: Checkpoint, model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fresh optimizer tensors, sharded like their parameters."""
    targets = {}
    for name, (shape, dtype) in checkpoint.tensors("optim").items():
        param = model.get(name.rpartition("/")[0])
        if param is not None:
            same = tuple(param.shape) == shape
            targets[name] = torch.zeros_like(param, dtype=dtype) if same else torch.zeros(shape, dtype=dtype)
    return targets


# ---------------------------------------------------------------------- for tests of one process


def saved(root: Path, *steps: int, health: Callable[[int], bool] = lambda step: True) -> Path:
    """A folder with checkpoints of these steps, committed in this order."""
    store = CheckpointStore(root)
    for step in steps:
        store.save(step, small(step, health(step)), run_id="run", retention=[KeepInterval(1)])
    store.close()
    return root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".lock")


def folder_of(root: Path, step: int) -> Path:
    return root / f"step_{step:07d}"


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def latest(root: Path, **kwargs: Any) -> Checkpoint:
    checkpoint = CheckpointStore(root).resolve("latest", **kwargs)
    assert checkpoint is not None
    return checkpoint


def in_child(target: Callable[[], None]) -> int:
    """Run `target` in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def small(step: int, is_healthy: bool = True, **more: Any) -> Content:
    """Content whose every part says the step; plain tensors, the same on each rank."""
    if not is_healthy:
        more["unhealthy"] = {"x": torch.tensor([0.0, math.nan])}
    tensors = {f"w{i}": torch.full((100 + i,), float(step)) for i in range(4)}
    return Content(
        {"model": tensors, **more},
        {"optim": {"m": torch.full((50,), float(step))}},
        {"step": step},
        [step],
        must_be_finite={"unhealthy/x"},
    )


def assert_holds(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.manifest.step == step
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors("model").items()}
    checkpoint.read_into("model", tensors)
    assert all(bool((tensor == step).all()) for tensor in tensors.values())
    assert checkpoint.global_state() == {"step": step}
    assert checkpoint.rank_state(collectives.rank()) == [step]


# ---------------------------------------------------------------------- failures


class Failing(FileSystem):
    """Fails at the operation with the number `at`, and counts them."""

    def __init__(self) -> None:
        self.at, self.count = -1, 0

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise OSError(5, "Input/output error")

    def make_dir(self, path: Path) -> None:
        self._step()
        super().make_dir(path)

    def write(self, path: Path, buffers: Iterable[Any], sync: bool = True) -> None:
        self._step()
        super().write(path, buffers, sync)

    def sync_dir(self, path: Path) -> None:
        self._step()
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)


def message_of(action: Callable[[], Any]) -> str:
    """The message of the CheckpointError that `action` raises on every rank."""
    try:
        action()
    except CheckpointError as ex:
        messages = collectives.gather_objects(str(ex))
        assert len(set(messages)) == 1, messages
        return messages[0]
    raise AssertionError("nothing was raised")


def meet() -> None:
    """Wait for the other ranks."""
    collectives.gather_objects(None)


def failures(folder: Path, form: str) -> dict[str, Any]:
    """What the ranks say when one of them fails, by scenario."""
    rank, last = collectives.rank(), collectives.world_size() - 1
    told: dict[str, Any] = {}
    fs = Failing()
    store = CheckpointStore(folder / "store", fs=fs)
    store.open()
    store.save(1, small(1), **ABOUT)

    def expect(name: str, action: Callable[[], Any]) -> None:
        told[name] = message_of(action)
        assert_holds(store.resolve("latest"), 1)
        assert collectives.broadcast_object(sorted(p.name for p in store.path.glob(".tmp*"))) == []

    # A limit on the size of files is met like a full disk: in the middle of a write.
    for where in (0, last):
        for name, save_it in (("sync", store.save), ("async", store.save_async)):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if rank == where:
                resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
            expect(f"fsize-{name}-{where}", lambda save_it=save_it: (save_it(2, small(2), **ABOUT), store.wait()))
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    bad_state = small(2)
    if rank == last:
        bad_state.rank_state = {"a": [object()]}
    expect("state", lambda: store.save(2, bad_state, **ABOUT))
    other = small(2, **({"ema": {"w": torch.zeros(3)}} if rank == last else {}))
    expect("groups", lambda: store.save(2, other, **ABOUT))
    other = small(2)
    if rank == last:
        other.weights["model"]["w2"] = torch.zeros(3)  # type: ignore[index]
    expect("shapes", lambda: store.save(2, other, **ABOUT))

    def copy(*_: Any) -> Any:
        raise MemoryError("no memory for the copy")

    if rank == last:
        store._buffers.hold = copy  # type: ignore[method-assign]
    expect("snapshot", lambda: (store.save_async(2, small(2), **ABOUT), store.wait()))
    if rank == last:
        del store._buffers.hold

    # Each operation in turn, on each rank. After the commit an error is no error any more.
    for where in (0, last):
        fs.count, fs.at = 0, -1
        store.save(1, small(1), **ABOUT)
        total = collectives.gather_objects(fs.count)[where]
        outcomes = []
        for at in range(1, total + 1):
            fs.count, fs.at = 0, at if rank == where else -1
            try:
                store.save(1, small(1), **ABOUT)
                outcome = "saved"
            except CheckpointError as ex:
                outcome = str(ex)
            assert len(set(collectives.gather_objects(outcome))) == 1
            outcomes.append(outcome)
            fs.at = -1
            assert_holds(store.resolve("latest"), 1)
        told[f"operations-{where}"] = outcomes
    store.save(3, small(3), **ABOUT, retention=[KeepPrevious(1)])
    assert_holds(store.resolve("latest"), 3)
    store.close()

    # Ranks that do not see one folder.
    apart = CheckpointStore(folder / f"apart{rank}")
    told["apart"] = message_of(apart.open)
    apart = CheckpointStore(folder / "apart0")
    apart.open()  # the lock was given back
    apart.close()

    # The newest of two folders, in either order; and what one rank alone cannot read.
    ages = CheckpointStore(folder / "ages")
    ages.save(2, small(2), **ABOUT)
    ages.close()
    stores = [CheckpointStore(folder / name) for name in ("store", "ages")]
    for both in (stores, stores[::-1]):
        found = find_newest([(store, "full") for store in both], logging.getLogger("worker"))
        assert found is not None
        assert found[0] is stores[1]
        assert_holds(found[1], 2)
    meet()
    if rank == 0:
        (folder / "ages" / "step_0000002" / "state" / f"rank_{last:05d}.json").write_bytes(b"")
    meet()
    found = find_newest([(store, "full") for store in stores], logging.getLogger("worker"))
    assert found is not None
    assert found[0] is stores[0]
    assert_holds(found[1], 3)
    meet()

    # Damage that only the rank with that part of the files sees.
    victim = folder / "store" / "step_0000003"
    paths = sorted(str(p.relative_to(victim)) for p in victim.rglob("*") if p.is_file() and p.name != "manifest.json")
    records: list[str] = []
    logger = logging.getLogger("worker")
    logger.propagate = False
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    store = CheckpointStore(folder / "store", logger=logger)
    for path in paths:
        kept = (victim / path).read_bytes()
        meet()
        if rank == 0:
            (victim / path).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        meet()
        records.clear()
        assert_holds(store.resolve("latest"), 1)
        assert not records if rank else path in records[0]
        assert path in message_of(lambda: store.resolve(3))
        if rank == 0:
            (victim / path).write_bytes(kept)
        meet()
        assert_holds(store.resolve("latest"), 3)
    return told


def main() -> None:
    what, folder, form = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if form != "single":
        dist.init_process_group("gloo")
    if what == "failures":
        told = failures(folder, form)
        if collectives.rank() == 0:
            (folder / "told.json").write_text(json.dumps(told))
    else:
        {"save": save, "load": load}[what](folder, form)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
