"""A byte language model with Accelerate by hand: accumulation in which each token weighs the same, warm-up, decay."""

import argparse
import contextlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

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


def log(accelerator, row):
    if accelerator.is_main_process:
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def main():
    accelerator = Accelerator()
    set_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(paragraphs, batch_size=args.batch_size, collate_fn=collate)
    warmup = max(1, args.max_steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, 1 - step / args.max_steps))
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    args.out.mkdir(parents=True, exist_ok=True)
    step = 0
    while step < args.max_steps:
        batches = iter(loader)
        for _ in range(min(len(loader) // args.accumulation, args.max_steps - step)):
            window = [next(batches) for _ in range(args.accumulation)]
            num_tokens = sum((batch["labels"] != -100).sum() for batch in window)
            num_tokens = accelerator.reduce(num_tokens, reduction="sum")
            total_loss = 0.0
            for i, batch in enumerate(window):
                is_last = i == len(window) - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                    logits = model(batch["inputs"])
                    loss = nn.functional.cross_entropy(
                        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
                    )
                    # DDP takes the mean over the processes, so the sum has to be multiplied by their number.
                    loss = loss * accelerator.num_processes / num_tokens
                    accelerator.backward(loss)
                total_loss += loss.detach()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            mean_loss = accelerator.reduce(total_loss, reduction="mean").item()
            log(accelerator, {"step": step, "loss": mean_loss, "lr": lr})


if __name__ == "__main__":
    main()
