"""What we rely on inside Accelerate and torch: a release that changes it fails here, by name, and not in a run."""

from __future__ import annotations

import importlib
import inspect
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook
from trainloop.state.optimizer import load_optimizer_state, optimizer_state
from trainloop.step.gradients import Gradients

from .launching import REPOSITORY, launch, on_ranks
from .small import SmallTrainer
from .workers.canaries import is_torchs_state


def model_with_gradients(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    (model(torch.randn(4, 7)).pow(2).sum() * scale).backward()
    return model


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e9, "the norm itself"])
def test_clipping_is_accelerates(max_norm: Any) -> None:
    """Norm and clipped gradients equal `accelerator.clip_grad_norm_`'s bit for bit."""
    accelerator = accelerate.Accelerator(cpu=True)
    theirs, ours = model_with_gradients(), model_with_gradients()
    if isinstance(max_norm, str):
        max_norm = accelerator.clip_grad_norm_(model_with_gradients().parameters(), 1e9).item()
    wanted = accelerator.clip_grad_norm_(theirs.parameters(), max_norm)
    gradients = Gradients(ours.parameters(), max_norm, None, torch.optim.SGD(ours.parameters()))
    norm = gradients.norm()
    gradients.clip(norm, norm.item())
    assert torch.equal(norm, wanted)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


def test_norm_and_clip_of_shards_are_torchs(tmp_path: Path) -> None:
    """On four ranks, for DTensors that are sharded over one or two dimensions of a mesh, with empty shards, of mixed
    dtypes, and for plain tensors beside them: torch's bits, by one all-reduce for each dimension, whatever the number
    of parameters, and no operation on a DTensor. Where sharded and replicated ones meet, the last bits may differ.
    """

    def work(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
        from torch.distributed.tensor.debug import CommDebugMode

        hsdp, flat = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
        shapes = [(7, 5), (1,), (64, 3), (2, 2, 2)] * 25

        def params(mesh: Any, placements: Any, dtypes: Any = (torch.float32,), shapes: Any = shapes) -> list[Any]:
            generator, made = torch.Generator().manual_seed(0), []
            for i, shape in enumerate(shapes):
                whole = torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
                if mesh is not None:
                    whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
                param = nn.Parameter(torch.zeros_like(whole))
                param.grad = whole
                made.append(param)
            return made

        def local(tensor: Any) -> torch.Tensor:
            return tensor.to_local() if isinstance(tensor, DTensor) else tensor

        class NoDTensors(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                assert not any(issubclass(kind, DTensor) for kind in types), func
                return func(*args, **(kwargs or {}))

        def compare(make: Any, num_reductions: int, *, tolerance: float = 0.0) -> None:
            theirs, ours = make(), make()
            by_mesh: dict[Any, list[Any]] = {}
            for param in theirs:
                by_mesh.setdefault(getattr(param, "device_mesh", None), []).append(param)
            norms = [torch.nn.utils.get_total_norm([param.grad for param in part]) for part in by_mesh.values()]
            whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
            wanted = whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole), 2.0)
            for mesh, part in by_mesh.items():
                total = wanted if mesh is None else DTensor.from_local(wanted, mesh)
                torch.nn.utils.clip_grads_with_norm_(part, 0.5, total)
            gradients = Gradients(ours, 0.5, None, torch.optim.SGD(ours))
            with CommDebugMode() as communication, NoDTensors():
                norm = gradients.norm()
                gradients.clip(norm, norm.item())
            assert communication.get_total_counts() == num_reductions, communication.get_comm_counts()
            assert not isinstance(norm, DTensor)
            torch.testing.assert_close(norm, wanted, rtol=tolerance, atol=0.0)
            for own, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(local(own.grad), local(other.grad), rtol=2 * tolerance, atol=0.0)

        both = (torch.float32, torch.bfloat16)
        compare(lambda: params(flat, [Shard(0)]), 1)
        compare(lambda: params(flat, [Shard(0)], shapes=shapes[:4]), 1)
        compare(lambda: params(flat, [Shard(0)], both), 1)
        compare(lambda: params(hsdp, [Replicate(), Shard(0)]), 1)
        compare(lambda: params(hsdp, [Replicate(), Replicate()]), 0)
        compare(lambda: params(hsdp, [Shard(0), Shard(0)]), 2)
        compare(lambda: [*params(None, None), *params(flat, [Shard(0)])], 1)
        compare(lambda: [*params(flat, [Replicate()]), *params(flat, [Shard(0)])], 1, tolerance=3e-7)

        summands = params(flat, [Replicate()], shapes=[(5, 3), (4,)])
        wanted = torch.nn.utils.get_total_norm([param.grad for param in summands]).full_tensor()
        for param in summands:
            param.grad = DTensor.from_local(param.grad.to_local() / 4, flat, [Partial()])
        gradients = Gradients(summands, 0.5, None, torch.optim.SGD(summands))
        norm = gradients.norm()
        torch.testing.assert_close(norm, wanted)
        gradients.clip(norm, norm.item())
        clipped = torch.nn.utils.get_total_norm([param.grad.full_tensor() for param in summands])
        torch.testing.assert_close(clipped, torch.tensor(0.5))

    assert on_ranks(4, tmp_path, work) == [0] * 4


def test_launched_canaries(tmp_path: Path) -> None:
    """Under DDP and FSDP2: our norm, clipping and division equal Accelerate's bit for bit; FSDP2 on CPU processes is
    what the launch asked for; state that we set by hand is read where we think it is.
    """
    for form in ("ddp2", "fsdp2"):
        launch(REPOSITORY / "tests" / "workers" / "canaries.py", form, str(tmp_path))
        for rank in range(2):
            assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
                "norm": True,
                "clipped": True,
                "is_fsdp2": form == "fsdp2",
                "no_sync_defers": True,
                "state": True,
            }


def wrapped_model(_: Any) -> nn.Module:
    """With what changes names or is not to be saved: compiled and checkpointed layers, buffers, a tied weight."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(checkpoint_wrapper(first), torch.compile(second), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile's own
def test_the_models_state_is_torchs() -> None:
    """Names and memory are those that `get_model_state_dict` gives, whose half a second of loading a save is spared."""
    trainer = SmallTrainer(0, model_=wrapped_model)
    trainer.train()
    assert is_torchs_state(trainer)
    assert list(trainer.live_model_state())[:4] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_backward_divides_by_the_accumulation() -> None:
    """`accelerator.backward` divides the loss by N, which the plain path does itself."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    )
    weight = nn.Parameter(torch.ones(()))
    accelerator.backward(weight * 2)
    assert weight.grad == torch.tensor(0.5)


@pytest.mark.parametrize("num_micro", [1, 4])
@pytest.mark.parametrize("grad_clip", [None, 0.05, 1e9])
def test_the_plain_way_is_accelerates(num_micro: int, grad_clip: float | None) -> None:
    """One process without a scaler takes shorter ways for backward, clipping and update: the weights and the norms
    equal those by the accelerator's own methods bit for bit.
    """

    class ByAccelerate(BaseHook):
        def on_before_train(self, trainer: Any) -> None:
            trainer._window._is_plain = trainer._gradients._is_uniform = False
            trainer._raw_optimizer = trainer.optimizer

    class Norms(BaseHook):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_after_step(self, trainer: Any) -> None:
            self.norms.append(trainer.step_info.grad_norm)

    def train(*hooks: BaseHook) -> tuple[list[torch.Tensor], list[float]]:
        norms = Norms()
        trainer = SmallTrainer(
            6,
            grad_clip=grad_clip,
            gradient_accumulation_steps=num_micro,
            model_=lambda self: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)),
            optimizer_=lambda self: torch.optim.AdamW(self.model.parameters(), lr=0.1),
            hooks_=lambda self: [norms, *hooks],
        )
        trainer.train()
        return [param.detach() for param in trainer.model.parameters()], norms.norms

    weights, norms = train()
    their_weights, their_norms = train(ByAccelerate())
    assert norms == their_norms
    assert all(map(torch.equal, weights, their_weights))


def test_sync_gradients_can_be_set_by_hand() -> None:
    """And the wrapped optimizer, which users may call, listens to it."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    model(torch.ones(1, 1)).sum().backward()
    before = model.weight.item()
    accelerator.sync_gradients = False
    optimizer.step()
    assert model.weight.item() == before
    accelerator.sync_gradients = True
    optimizer.step()
    assert model.weight.item() == before - 1


def test_accumulation_settings_live_where_we_set_them() -> None:
    """`GradientState.plugin_kwargs` holds them for the whole process."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    accelerator.gradient_state.plugin_kwargs.update(num_steps=5, sync_with_dataloader=False)
    assert accelerator.gradient_accumulation_steps == 5
    assert accelerator.gradient_state.sync_with_dataloader is False


def test_a_scaler_that_is_set_before_prepare_is_used() -> None:
    """`accelerator.scaler` is taken by the optimizer that `prepare` wraps."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    model = nn.Linear(1, 1)
    _, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    assert optimizer.scaler is accelerator.scaler


def test_prepared_loaders_have_what_we_ask_them() -> None:
    """`end`, `device` and `use_stateful_dataloader` of Accelerate's two loaders."""
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.ones(4, 1))))
    assert isinstance(loader, DataLoaderShard)
    assert loader.use_stateful_dataloader is False
    assert loader.device == torch.device("cpu")
    for kind in (DataLoaderShard, DataLoaderDispatcher):
        assert callable(kind.end)


def test_torchs_loader_can_be_told_to_end_its_workers() -> None:
    """`_shutdown_workers` is private, and the only way."""
    iterator: Any = iter(DataLoader(TensorDataset(torch.ones(4, 1)), num_workers=1))
    worker = iterator._workers[0]
    iterator._shutdown_workers()
    assert not worker.is_alive()


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.Adam(params, amsgrad=True),
        lambda params: torch.optim.AdamW(params),
        lambda params: torch.optim.NAdam(params),
        lambda params: torch.optim.RAdam(params),
        lambda params: torch.optim.Adamax(params),
        lambda params: torch.optim.Adadelta(params),
        lambda params: torch.optim.Adagrad(params),
        lambda params: torch.optim.Adafactor(params),
        lambda params: torch.optim.ASGD(params),
        lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
        lambda params: torch.optim.Rprop(params),
    ],
)
def test_reading_optimizer_state_changes_nothing_and_loads_exactly(make: Any) -> None:
    """For torch's optimizers, before the first step and later; a frozen parameter and one without a gradient too."""

    def setup() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
        model[0].bias.requires_grad_(False)
        return model, make(model.parameters())

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for i in numbers:
            optimizer.zero_grad()
            model[1](model[0](torch.full((2, 3), float(i + 1)))).pow(2).sum().backward()
            optimizer.step()

    model, optimizer = setup()
    steps(model, optimizer, range(6))
    other_model, other = setup()
    for start in (0, 3):
        state = optimizer_state(other_model, other)
        resumed_model, resumed = setup()
        resumed_model.load_state_dict(other_model.state_dict())
        load_optimizer_state(resumed_model, resumed, state)
        other_model, other = resumed_model, resumed
        steps(other_model, other, range(start, start + 3))
    for own, wanted in zip(other_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, wanted)


def test_torch_gives_every_attempt_of_a_launch_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What trainloop/ranks/rendezvous.py mends. If this fails, torch has mended it, and that module can go."""
    torchs: Any = importlib.import_module("torch.distributed.rendezvous")
    create_store = inspect.unwrap(torchs._create_c10d_store)
    assert create_store is not torchs._create_c10d_store  # ours is in its place
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launchers = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    counts = []
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        store = create_store("127.0.0.1", launchers.port, 0, 2, timedelta(seconds=10))
        counts.append(store.add("processes that have seen this key", 1))
    assert counts == [1, 2]
