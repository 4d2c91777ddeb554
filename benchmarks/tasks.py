"""What is trained: small models, the batches that every system gets, and how a run of it is described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .gpt import GPT

CLIP = 1.0
"""Limit of the gradient's 2-norm: the first steps of each task are above it, and some of the later ones are not."""


@dataclass(frozen=True)
class Task:
    """One training run, the same for every system."""

    model: str
    num_micro: int = 1
    """Micro-batches an optimizer step."""
    precision: str = "no"
    """"no" or "bf16", as Accelerate writes it."""
    world_size: int = 1
    """Processes; more than one is DDP, unless `is_sharded`."""
    num_steps: int = 100
    """Optimizer steps a turn."""
    num_turns: int = 12
    """Turns, the first of which warms up."""
    optimizer: str = "adamw"
    """"adamw", torch's defaults, "fused adamw", or "sgd", whose update reads nothing on the host."""
    counts_host_reads: bool = False
    """Count the host reads; then the times mean nothing."""
    device: str = "cpu"
    """Or "cuda"."""
    is_compiled: bool = False
    """Whether the model goes through `torch.compile`."""
    is_launched: bool = False
    """Run a single process under DDP, too, as a launcher starts it."""
    is_sharded: bool = False
    """FSDP2 in place of DDP."""

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1 or self.is_launched

    @property
    def is_ddp(self) -> bool:
        return self.is_distributed and not self.is_sharded

    @property
    def strategy(self) -> str:
        """For a table: "DDP x 2", or nothing for a single process."""
        return f"{'FSDP2' if self.is_sharded else 'DDP'} x {self.world_size}" if self.world_size > 1 else ""

    @property
    def num_batches(self) -> int:
        """Micro-batches of one process: the turns, and two steps more, so that no system is at its end in the last."""
        return self.num_micro * (self.num_steps * self.num_turns + 2)

    @property
    def batches_a_turn(self) -> int:
        """Micro-batches of one process in a turn."""
        return self.num_micro * self.num_steps


class Transformer(nn.Module):
    """A decoder of 10 million parameters: 4 layers of width 384, tied to nothing, without dropout."""

    def __init__(self, vocabulary: int = 4096, width: int = 384, num_layers: int = 4, max_length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(max_length, width))
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(max_length), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        hidden = self.layers(self.tokens(x) + self.positions[:length], mask=self.mask[:length, :length], is_causal=True)
        logits: torch.Tensor = self.head(hidden)
        return logits


def mlp(*widths: int, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def deep(num_tensors: int) -> nn.Module:
    """An MLP of `num_tensors` parameters, each small."""
    return mlp(16, *[16] * (num_tensors // 2 - 1), 1)


class Wide(nn.Module):
    """`num_tensors` parameters that share one multiplication: what grows with them is the step, not the model."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(16) / 4 for _ in range(num_tensors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (x @ torch.stack(list(self.rows)).T).tanh().mean(1, keepdim=True)
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny MLP": lambda: mlp(16, 32, 1),
    "tiny MLP, BatchNorm": lambda: mlp(16, 32, 1, norm=True),
    "400 small tensors": lambda: deep(400),
    "10M transformer": Transformer,
    "GPT 124M": GPT,
    "GPT tiny": lambda: GPT(256, 64, 2, 4, 32),
}
"""Models by name; `make_model` also knows "N tensors"."""
TEXTS = {"10M transformer": (4096, 32), "GPT 124M": (50304, 1024), "GPT tiny": (256, 32)}
"""Number of tokens and length of a sequence, for the models that read text."""


def make_model(name: str) -> nn.Module:
    """The same initial weights in every process."""
    torch.manual_seed(0)
    if name.endswith(" tensors") and name not in MODELS:
        return Wide(int(name.split()[0]))
    return MODELS[name]()


def make_optimizer(task: Task, params: Any) -> torch.optim.Optimizer:
    if task.optimizer == "sgd":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(params, lr=1e-3, fused=True if task.optimizer == "fused adamw" else None)


def batch_size(task: Task) -> int:
    """Samples of a micro-batch of one process."""
    return 8 if task.model == "GPT 124M" else 2 if task.model in TEXTS else 32


def make_data(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of all samples, for all processes together.

    Returns:
        N x 16 and N x 1 floats, or N x length and N x length token ids.
    """
    num_samples = task.num_batches * task.world_size * batch_size(task)
    generator = torch.Generator().manual_seed(0)
    if task.model in TEXTS:
        vocabulary, length = TEXTS[task.model]
        tokens = torch.randint(vocabulary, (num_samples, length + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    x = torch.randn(num_samples, 16, generator=generator)
    return x, 3 * x.sum(1, keepdim=True)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean loss of a micro-batch, in fp32."""
    if target.dtype == torch.int64:
        return nn.functional.cross_entropy(output.float().flatten(0, 1), target.flatten())
    return nn.functional.mse_loss(output.float(), target)
