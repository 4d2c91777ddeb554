"""Next-character prediction on the Zen of Python, after the usual minimal GPT scripts."""

import codecs
import contextlib
import io
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.data import IterableDataset

from trainloop import BaseHook, BaseTrainer, ProgressHook

with contextlib.redirect_stdout(io.StringIO()):
    import this

TEXT = codecs.decode(this.s, "rot13")
CHARS = sorted(set(TEXT))
STOI = {c: i for i, c in enumerate(CHARS)}


@dataclass
class GPTConfig:
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 48
    block_size: int = 32


class Windows(IterableDataset):
    """Random windows of different lengths, padded with -100."""

    def __iter__(self):
        ids = torch.tensor([STOI[c] for c in TEXT])
        g = torch.Generator().manual_seed(0)
        for _ in range(4000):
            n = int(torch.randint(8, GPTConfig.block_size + 1, (), generator=g))
            s = int(torch.randint(0, len(ids) - n - 1, (), generator=g))
            x, y = torch.zeros(GPTConfig.block_size, dtype=torch.long), torch.full((GPTConfig.block_size,), -100)
            x[:n], y[:n] = ids[s : s + n], ids[s + 1 : s + n + 1]
            yield x, y


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.attn = nn.MultiheadAttention(c.n_embd, c.n_head, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(c.n_embd, 4 * c.n_embd), nn.GELU(), nn.Linear(4 * c.n_embd, c.n_embd))

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        h = self.ln1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(len(CHARS), c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        self.head = nn.Linear(c.n_embd, len(CHARS), bias=False)
        self.head.weight = self.wte.weight  # tied
        nn.init.normal_(self.wte.weight, std=0.5)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


class Best(BaseHook):
    loss = float("inf")

    def on_after_step(self, trainer):
        if trainer.step % 25 == 0:
            self.loss = min(self.loss, trainer.accelerator.reduce(trainer.step_info.loss, "mean").item())


class LM(BaseTrainer):
    def build_data_loader(self):
        return torch.utils.data.DataLoader(Windows(), batch_size=8)

    def build_model(self):
        return GPT(GPTConfig())

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.9, 0.95))

    def build_lr_scheduler(self):
        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: min(1.0, (s + 1) / 20))

    def build_hooks(self):
        self.best = Best()
        return [self.best, ProgressHook(50)]

    def batch_weight(self, batch):
        return (batch[1] != -100).sum()

    def forward(self, batch):
        x, y = batch
        logits = self.model(x)
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()), {}


trainer = LM(150, grad_clip=1.0, gradient_accumulation_steps=2, seed=1)
trainer.train()
trainer.accelerator.print(f"RESULT loss={trainer.best.loss:.3f}")
