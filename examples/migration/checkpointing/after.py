"""The same with `CheckpointingHook`: what was saved by hand can be named to go on from."""

import argparse
import json
from pathlib import Path

import torch
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, CheckpointingHook, LoggingHook, Trainer

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/checkpointing"))
parser.add_argument("--max_steps", type=int, default=24)
parser.add_argument("--stop_at", type=int, default=None, help="leave after this step, as a crash would")
parser.add_argument("--save_every", type=int, default=4)
parser.add_argument("--resume", default="latest", help="'latest' or a folder, also of `accelerator.save_state`")
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--lr", type=float, default=3e-3)
args = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1)[:1024] / 16
labels = torch.tensor(digits.target)[:1024]


class JsonLog(BaseHook):
    def on_log(self, trainer, records, dry_run):
        if trainer.accelerator.is_main_process:
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": trainer.step, **records}) + "\n")

    def on_after_step(self, trainer):
        if trainer.step == args.stop_at:
            raise SystemExit


def forward(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y), {}


def main():
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(TensorDataset(images, labels), batch_size=args.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.max_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    Trainer(
        model=model,
        optimizer=optimizer,
        data_loader=loader,
        forward=forward,
        lr_scheduler=scheduler,
        hooks=[
            CheckpointingHook(args.save_every, keep_previous=1, load=args.resume),
            LoggingHook(interval=1),
            JsonLog(),
        ],
        max_steps=args.max_steps,
        workspace=args.out,
        seed=0,
    ).train()


if __name__ == "__main__":
    main()
