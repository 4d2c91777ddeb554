"""The same as a subclass: `batch_weight` is all that is left of the window."""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from trainloop import BaseHook, BaseTrainer, LoggingHook

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/language_model"))
parser.add_argument("--max_steps", type=int, default=24)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--accumulation", type=int, default=2)
parser.add_argument("--lr", type=float, default=5e-3)
args = parser.parse_args()

text = Path(argparse.__file__).read_bytes()  # the source of argparse, as a text that every Python has
paragraphs = [p.strip()[:96] for p in text.split(b"\n\n") if len(p.strip()) > 8][:192]


def collate(batch):
    tokens = [torch.tensor(list(p)) for p in batch]
    padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100)
    return {"inputs": padded[:, :-1].clamp(min=0), "labels": padded[:, 1:]}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.rnn = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def forward(self, tokens):
        return self.head(self.rnn(self.embedding(tokens))[0])


class JsonLog(BaseHook):
    def on_log(self, trainer, records, dry_run):
        if trainer.accelerator.is_main_process:
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": trainer.step, **records}) + "\n")


class LanguageModelTrainer(BaseTrainer):
    def build_data_loader(self):
        return DataLoader(paragraphs, batch_size=args.batch_size, collate_fn=collate)

    def build_model(self):
        return Model()

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=args.lr)

    def build_lr_scheduler(self):
        warmup = max(1, self.max_steps // 10)
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, max(0.0, 1 - step / self.max_steps))
        )

    def build_hooks(self):
        return [LoggingHook(interval=1), JsonLog()]

    def batch_weight(self, batch):
        return (batch["labels"] != -100).sum()

    def forward(self, batch):
        logits = self.model(batch["inputs"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100), {}


if __name__ == "__main__":
    args.out.mkdir(parents=True, exist_ok=True)
    LanguageModelTrainer(args.max_steps, grad_clip=1.0, gradient_accumulation_steps=args.accumulation, seed=0).train()
