"""Models on the meta device are sharded, and then filled: the same bits at any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainloop import BaseHook, CheckpointingHook
from trainloop.errors import CheckpointError

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer
from .test_load_memory import Peak
from .workers import meta_models

WORKER = REPOSITORY / "tests" / "workers" / "meta_models.py"
BY_CLASS = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one process, and a sharded folder of a tiny transformers model."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("meta")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(meta_models.tiny_config())
    model.save_pretrained(folder / "pretrained", max_shard_size="4KB")
    launch(WORKER, "single", str(folder), "single")
    return folder


@pytest.mark.parametrize(
    "form", ["fsdp3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("ddp2", "fsdp2", "hsdp2x2"))]
)
def test_any_number_of_processes_begins_with_the_same_weights(form: str, out: Path) -> None:
    """Weights are equal to the bit, and losses to the rounding, in one process, DDP and FSDP2. Filled are: tied
    weights, buffers, attention, statistics, frozen layers, a model of transformers from its configuration and from a
    folder, a checkpoint of ours, and two modules with an optimizer each. A part with values of its own keeps rank 0's.
    """
    launch(WORKER, form, str(out), form, launch_args=BY_CLASS if "sdp" in form else [])
    single = json.loads((out / "single.0.json").read_text())
    assert single["folder"]["initial"] == single["eager"]["initial"]
    assert single["folder"]["losses"] == single["eager"]["losses"]
    assert single["llama"]["initial"] != single["folder"]["initial"]
    num_bytes = []
    for rank in range(NUM_PROCESSES[form]):
        results = json.loads((out / f"{form}.{rank}.json").read_text())
        for name in ("mixed", "llama", "untied", "folder", "pair", "first", "uninterrupted", "from_ours"):
            found, wanted = results[name], single[name]
            assert found["initial"] == wanted["initial"], name
            assert found["tied"] == wanted["tied"]
            assert len(found["tied"]) == (name not in ("pair",)), name
            assert found["is_sharded"] == ("sdp" in form), name
            if name not in ("first", "uninterrupted"):  # BatchNorm sees the rank's samples
                assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
            assert found["has_optimizer_state"] == (found["num_trained"] if found["losses"] else 0)
        assert results["llama"]["initial"] == results["untied"]["initial"]
        assert results["evaluated"] == pytest.approx(single["evaluated"])
        num_bytes.append(results["bytes"])

        # A restart goes on to the bit. It draws no weights that the checkpoint has: of `Mixed`, whose constructor calls
        # the first three, only the part with a buffer that is not saved.
        assert results["resumed"]["final"] == results["uninterrupted"]["final"]
        assert results["resumed"]["averages"] == results["uninterrupted"]["averages"]
        assert len(results["resumed"]["losses"]) == 2
        assert results["calls"] == ["Scale", "Block", "Block", "Scale"]
        assert results["from_single"]["final"] == single["first"]["final"]
        assert results["from_single"]["averages"] == single["first"]["averages"]
        assert results["from_ours"]["final"] == single["first"]["final"]
        assert "on some ranks" in results["uneven"]

    # Each rank has read its part of each tensor; torch rounds the parts up to whole rows.
    num_parts = 1 if form == "ddp2" else 2 if form == "hsdp2x2" else NUM_PROCESSES[form]
    assert max(num_bytes) <= 1.1 * single["bytes"] / num_parts
    assert sum(num_bytes) == single["bytes"] * NUM_PROCESSES[form] // num_parts


@pytest.mark.slow
def test_a_rank_holds_its_shards_and_one_whole_module(tmp_path: Path) -> None:
    """Four ranks build a model of 400 MB in layers of 17 MB. On the meta device a rank needs its quarter and one layer
    more, and what torch and the allocator need; on the CPU more than the whole model.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that freed memory goes back to the system at once
    launch(WORKER, "fsdp2", str(tmp_path), "memory", launch_args=[*BY_CLASS, "--num_processes", "4"], env=at_once)
    layer = 4 * meta_models.LARGE**2
    whole = meta_models.NUM_LARGE * layer
    for rank in range(4):
        peaks = json.loads((tmp_path / f"memory.{rank}.json").read_text())
        assert peaks["cpu"] > whole
        assert peaks["meta"] < whole / 4 + 1.5 * layer, peaks


def test_initialising_takes_the_memory_of_one_module() -> None:
    """In one process: the model, and one whole layer more."""

    def build(_: Any) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(3, 512), *(nn.Linear(512, 512) for _ in range(8)), nn.Linear(512, 1))

    with Peak() as memory:
        trainer = SmallTrainer(0, model_=build)
        trainer.train()
    whole = sum(param.nbytes for param in trainer.model.parameters())
    assert whole < memory.peak < whole + 1.5 * 4 * 512 * 513, memory.peak / whole


# ---------------------------------------------------------------------- what initialises a module


class Bare(nn.Module):
    """A parameter and a buffer that nothing initialises."""

    def __init__(self, *, is_persistent: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(3), persistent=is_persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale * self.mask


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(3))
        self.counts = nn.Buffer(torch.zeros(2, dtype=torch.int64))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias[:2])


class Gpt(nn.Module):
    """Initialises its parts as many models do: in `_init_weights`, which `apply` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 1)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Reaching(Gpt):
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.zeros_(self.head.bias.data)


def on_meta(make: Callable[[], nn.Module]) -> Any:
    def build(_: Any) -> nn.Module:
        with torch.device("meta"):
            return make()

    return build


def test_what_apply_would_have_done_is_done() -> None:
    """`reset_parameters` of a part comes first, then the `_init_weights` of its model; also in a compiled model, and
    for one that is only in part on the meta device.
    """

    def half(_: Any) -> nn.Module:
        model = Gpt()
        model.layers[1].to("meta")
        nn.init.constant_(model.layers[0].weight, 2.0)
        return model

    for build in (on_meta(Gpt), on_meta(lambda: torch.compile(Gpt(), backend="eager")), half):  # type: ignore[arg-type, return-value]
        trainer = SmallTrainer(0, model_=build)
        trainer.train()
        model: Any = trainer.unwrapped_model
        first = 2.0 if build is half else 0.5
        assert (model.layers[0].weight == first).all()
        assert (model.layers[1].weight == 0.5).all()
        assert (model.norm.weight == 1).all()
        assert 0 < model.layers[1].bias.abs().max() < 1
        assert model.layers[0].bias.tolist() != model.layers[1].bias.tolist()


def test_who_reads_weights_too_early_sees_nan() -> None:
    """`build_hooks` comes before it is known whether a checkpoint has them; `on_before_train` sees them."""
    seen = []

    class Look(BaseHook):
        def on_before_train(self, trainer: Any) -> None:
            seen.append(next(trainer.model.parameters()).detach().clone())

    def hooks(trainer: Any) -> list[BaseHook]:
        seen.append(next(trainer.model.parameters()).detach().clone())
        return [Look()]

    SmallTrainer(0, model_=on_meta(lambda: nn.Linear(3, 1)), hooks_=hooks).train()
    assert seen[0].isnan().all()
    assert not seen[1].isnan().any()


def test_initialising_leaves_the_generators_alone() -> None:
    """Noise in training is the same as in a run whose model has its weights already."""
    noise = []
    for build in (on_meta(lambda: nn.Linear(3, 1)), lambda _: nn.Linear(3, 1)):
        trainer = SmallTrainer(
            1, model_=build, forward_=lambda self, batch: (noise.append(torch.rand(2)), loss_of(self, batch))[1]
        )
        trainer.train()
    assert torch.equal(*noise)


def loss_of(trainer: Any, batch: Any) -> Any:
    return trainer.model(batch[0]).pow(2).mean(), {}


# ---------------------------------------------------------------------- weights from files


class Fine(SmallTrainer):
    path: Any = None

    def initial_weights(self) -> Any:
        return self.path


def fine(path: Any, build: Any, **kwargs: Any) -> Fine:
    trainer = Fine(0, model_=build, **kwargs)
    trainer.path = path
    return trainer


def test_weights_are_cast_and_a_restart_does_not_read_them(tmp_path: Path) -> None:
    """A file, and a checkpoint of ours, into models on the CPU and on the meta device and of another dtype."""
    weights = {"weight": torch.tensor([[1.0, 2.0, 3.0]]), "bias": torch.tensor([4.0])}
    save_file(weights, tmp_path / "weights.safetensors")
    ours = Fine(0, workspace=tmp_path / "ours", hooks_=lambda self: [CheckpointingHook(1)])
    ours.path = tmp_path / "weights.safetensors"
    ours.train()
    ours.max_steps = 1
    ours.train()
    trained = {name: tensor.clone() for name, tensor in ours.live_model_state().items()}
    step = tmp_path / "ours" / "checkpoints" / "step_0000001"
    for dtype in (torch.float32, torch.bfloat16):
        for device in ("cpu", "meta"):
            for path, wanted in ((ours.path, weights), (step, trained), (step / "model", trained)):
                trainer = fine(path, lambda _, d=device, t=dtype: nn.Linear(3, 1, device=d, dtype=t))
                trainer.train()
                for name, tensor in trainer.live_model_state().items():
                    assert tensor.dtype == dtype
                    assert torch.equal(tensor, wanted[name].to(dtype))
    (tmp_path / "weights.safetensors").unlink()
    again = fine(
        ours.path, lambda _: nn.Linear(3, 1), workspace=tmp_path / "ours", hooks_=lambda self: [CheckpointingHook(1)]
    )
    again.train()
    assert again.step == 1
    assert torch.equal(again.unwrapped_model.weight, trained["weight"])


def test_what_a_checkpoint_leaves_out_is_filled(tmp_path: Path) -> None:
    """A parameter was frozen in the saved run, so its checkpoint leaves it out; in this run it is trained."""

    def build(is_frozen: bool) -> Any:
        def two(_: Any) -> nn.Module:
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
            model[0].requires_grad_(not is_frozen)
            return model

        return two

    def run(is_frozen: bool, max_steps: int) -> SmallTrainer:
        trainer = SmallTrainer(
            max_steps,
            model_=build(is_frozen),
            optimizer_=lambda self: torch.optim.SGD([{"params": self.model[1].parameters()}], lr=0.1),
            workspace=tmp_path,
            hooks_=lambda self: [CheckpointingHook(1, trainable_only=True)],
        )
        trainer.train()
        return trainer

    first, second = run(True, 1), run(False, 2)
    assert second.step == 2
    assert torch.equal(first.unwrapped_model[0].weight, second.unwrapped_model[0].weight)  # type: ignore[index]


def lora(_: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        return peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
def test_errors(tmp_path: Path) -> None:
    """Each says what cannot be filled, all of it in one error, and what to do."""
    save_file({"0.weight": torch.ones(1, 3), "0.bias": torch.ones(1)}, tmp_path / "some.safetensors")
    some = tmp_path / "some.safetensors"
    two = on_meta(lambda: nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)))
    cases: list[tuple[Any, Any, type[Exception], list[str]]] = [
        (
            None,
            on_meta(lambda: nn.Sequential(Bare(), nn.Linear(3, 3), Bare())),
            ValueError,
            ["nothing initialises 4 tensors: 0.scale, 0.mask, 2.scale, 2.mask.", "`reset_parameters`"],
        ),
        (None, on_meta(lambda: nn.Sequential(Half())), ValueError, ["2 tensors: 0.bias, 0.counts."]),
        (
            None,
            on_meta(Reaching),
            ValueError,
            ["`_init_weights(the model)` changes head.bias, which is another module's"],
        ),
        (
            some,
            two,
            CheckpointError,
            ["some.safetensors are not those of this run's model", "2 not in the file: 1.bias, 1.weight"],
        ),
        (
            some,
            on_meta(lambda: nn.Sequential(Bare(is_persistent=False))),
            ValueError,
            ["1 tensors: 0.mask.", "init_empty_weights"],
        ),
        (tmp_path / "none", two, CheckpointError, ["initial weights", "none"]),
        (3, two, TypeError, ["`initial_weights` must return a path or None, but returned 3 (int)."]),
        (None, lora, ValueError, ["adapters of peft (first: base_model.model.0)"]),
    ]
    for path, build, error, parts in cases:
        with pytest.raises(error) as raised:
            fine(path, build).train()
        for part in parts:
            assert part in str(raised.value)
