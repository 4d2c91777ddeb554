"""Trains models that were built on the meta device, and writes what each rank saw.

Usage: accelerate launch --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP meta_models.py OUT FORM

OUT holds `pretrained/`, a sharded folder of a tiny transformers model, and `single/`, the results of one process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook

CALLS: list[str] = []
"""Kinds of modules whose `reset_parameters` was called."""


class Scale(nn.Module):
    """A layer with a parameter of its own and a buffer that is not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.register_buffer("angles", torch.empty(width), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        CALLS.append("Scale")
        nn.init.uniform_(self.scale, 0.5, 1.5)
        self.angles = torch.arange(len(self.scale)) / 10.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale * self.angles.cos()


class Block(nn.Module):
    """A layer that changes what its parts have drawn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        CALLS.append("Block")
        nn.init.normal_(self.outer.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.outer(self.inner(x).relu())
        return out


class Mixed(nn.Module):
    """Tied weights, attention, statistics, a frozen layer, and a part with values of its own."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.scale = Scale(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.norm = nn.BatchNorm1d(16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        with torch.device("cpu"):
            self.real = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.scale(self.embedding(tokens))
        x = x + self.attention(x, x, x)[0]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.flatten(0, 1)).view_as(x)
        return self.head(self.real(self.frozen(x)))


def tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def digest(tensors: Any) -> dict[str, str]:
    """Of the whole tensors' bits, by name."""
    return {
        name: hashlib.sha1(bytes(whole(t).contiguous().reshape(-1).view(torch.uint8).tolist())).hexdigest()
        for name, t in tensors.items()
    }


class Look(BaseHook):
    """What the model holds when training begins, and the mean loss of each step."""

    def on_before_train(self, trainer: BaseTrainer) -> None:
        model = trainer.unwrapped_model
        # BatchNorm's statistics are not compared: under DDP each rank has its own.
        self.initial = digest(trainer.live_model_state() | dict(model.named_buffers()))
        self.losses: list[float] = []
        self.tied = {name for name, _ in model.named_parameters()} ^ {
            name for name, _ in model.named_parameters(remove_duplicate=False)
        }

    def on_after_step(self, trainer: BaseTrainer) -> None:
        self.losses.append(trainer.accelerator.reduce(trainer.step_info.loss, reduction="mean").item())


class Run(BaseTrainer):
    workspace_: Path | None = None
    load: Any = "latest"

    def build_data_loader(self) -> Any:
        tokens = torch.randint(20, (24, 6), generator=torch.Generator().manual_seed(1))
        return DataLoader(tokens, batch_size=12 // self.accelerator.num_processes)  # type: ignore[arg-type]

    def build_model(self) -> Any:
        with torch.device("meta"):
            return Mixed()

    def build_optimizer(self) -> Any:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() <= 1]
        return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=1e-2, fused=True)

    def build_hooks(self) -> Any:
        self.look, self.ema = Look(), EmaHook(decay=0.5)
        saves = [CheckpointingHook(2, keep_previous=3, load=self.load)] if self.workspace is not None else []
        return [self.look, self.ema, *saves]

    def forward(self, batch: Any) -> Any:
        logits = self.model(batch)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), {}


class Frozen(Run):
    """In eval mode, so that BatchNorm computes the same at any number of processes."""

    def build_model(self) -> Any:
        model = super().build_model()
        model.norm.eval()
        return model


class Llama(Run):
    """From a configuration."""

    def build_model(self) -> Any:
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            return LlamaForCausalLM(tiny_config())

    def forward(self, batch: Any) -> Any:
        return self.model(input_ids=batch, labels=batch).loss, {}


class Untied(Llama):
    """`init_empty_weights` leaves buffers on the CPU and unties weights."""

    def build_model(self) -> Any:
        from transformers import LlamaForCausalLM

        with accelerate.init_empty_weights():
            return LlamaForCausalLM(tiny_config())


class FromFolder(Llama):
    folder: Path

    def initial_weights(self) -> Path:
        return self.folder


class Eager(FromFolder):
    """The same weights on the CPU."""

    def build_model(self) -> Any:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(self.folder)

    def initial_weights(self) -> Any:
        return None


class Pair(Run):
    """Two modules, with an optimizer each."""

    def build_model(self) -> Any:
        with torch.device("meta"):
            one, two = nn.Sequential(nn.Embedding(20, 16), Block(16)), nn.Sequential(Block(16), nn.Linear(16, 20))
        one._no_split_modules = two._no_split_modules = ("Block",)  # type: ignore[assignment]
        return {"one": one, "two": two}

    def build_optimizer(self) -> Any:
        return {name: torch.optim.AdamW(module.parameters(), lr=1e-2) for name, module in self.model.items()}

    def forward(self, batch: Any) -> Any:
        logits = self.model["two"](self.model["one"](batch))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), {}


class Uneven(Run):
    """On the meta device on one rank only."""

    def build_model(self) -> Any:
        with torch.device("meta" if self.accelerator.process_index == 1 else "cpu"):
            return Mixed()


LARGE, NUM_LARGE = 2048, 24


class Large(Run):
    """400 MB in layers of 17 MB."""

    device_: str

    def build_model(self) -> Any:
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
        with torch.device(self.device_):
            model = nn.Sequential(*(nn.Linear(LARGE, LARGE, bias=False) for _ in range(NUM_LARGE)))
        model._no_split_modules = ("Linear",)  # type: ignore[assignment]
        return model

    def build_optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def build_hooks(self) -> Any:
        return []


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """Counts the bytes of the tensors that are taken out of safetensors files."""
    import safetensors

    real, taken = safetensors.safe_open, []

    class Part:
        def __init__(self, part: Any) -> None:
            self.part = part

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor: torch.Tensor = self.part[index]
            taken.append(tensor.nbytes)
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.part, name)

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Part:
            return Part(self.file.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor: torch.Tensor = self.file.get_tensor(name)
            taken.append(tensor.nbytes)
            return tensor

    safetensors.safe_open = Counting  # type: ignore[misc]
    try:
        yield taken
    finally:
        safetensors.safe_open = real  # type: ignore[misc]


def seen(trainer: Run) -> dict[str, Any]:
    look: Any = trainer.look
    params = list(trainer.model.parameters())
    return {
        "initial": look.initial,
        "losses": look.losses,
        "tied": sorted(look.tied),
        "final": digest(trainer.live_model_state()),
        "averages": digest(trainer.state_dict()["ema"]),
        "is_sharded": all(hasattr(p, "device_mesh") for p in params),
        "has_optimizer_state": sum(p in trainer._raw_optimizer.state for p in params if p.requires_grad),
        "num_trained": sum(p.requires_grad for p in params),
    }


def main(out: Path, form: str) -> dict[str, Any]:
    """Run all; return the results of this rank."""
    results: dict[str, Any] = {}

    def run(name: str, trainer: Run) -> Run:
        if trainer.accelerator.is_fsdp2:  # Accelerate keeps the classes of the first model
            trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
        trainer.train()
        results[name] = seen(trainer)
        return trainer

    run("mixed", Frozen(4, seed=5))
    run("llama", Llama(2, seed=5))
    run("untied", Untied(2, seed=5))
    if form == "single":
        run("eager", type("Eager", (Eager,), {"folder": out / "pretrained"})(2, seed=5))
    with bytes_read() as taken:
        run("folder", type("Folder", (FromFolder,), {"folder": out / "pretrained"})(2, seed=5))
    results["bytes"] = sum(taken)

    home = out / form
    run("first", Run(2, seed=5, workspace=home))
    CALLS.clear()
    run("resumed", Run(4, seed=5, workspace=home))
    results["calls"] = list(CALLS)  # the constructors of one `Mixed` on the meta device, and what is filled
    run("uninterrupted", Run(4, seed=5))
    from_single = out / "single" / "checkpoints" / "step_0000002"
    elsewhere = type("Elsewhere", (Run,), {"load": from_single})
    run("from_single", elsewhere(2, seed=7, workspace=out / f"{form}-from-single"))
    ours = type("Ours", (Run,), {"initial_weights": lambda self: from_single})
    run("from_ours", ours(0, seed=7))
    run("pair", Pair(2, seed=5))
    evaluated = Frozen(1, seed=5)
    if evaluated.accelerator.is_fsdp2:
        evaluated.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
    results["evaluated"] = evaluated.evaluate(evaluated.build_data_loader())["loss"]
    try:
        Uneven(1, seed=5).train()
    except ValueError as ex:
        results["uneven"] = str(ex)
    return results


def memory(out: Path) -> dict[str, Any]:
    """Peak memory while a model is built, above that before, in bytes: on the meta device, and on the CPU."""
    Pair(0, seed=5).train()  # imports what a sharded model needs
    results: dict[str, Any] = {}
    for name, device in (("meta", "meta"), ("cpu", "cpu")):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        trainer = type("Large", (Large,), {"device_": device})(0, seed=5)
        trainer.train()
        results[name] = status("VmHWM") - before
        del trainer
    return results


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    result = (memory if sys.argv[2] == "memory" else partial(main, form=sys.argv[2]))(Path(sys.argv[1]))
    rank = accelerate.PartialState().process_index
    Path(sys.argv[1], f"{sys.argv[2]}.{rank}.json").write_text(json.dumps(result))
