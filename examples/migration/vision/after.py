"""The same with the smallest step: all up to `accelerator.prepare` stays, `Trainer` takes the prepared objects."""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, CheckpointingHook, EvaluationHook, LoggingHook, Trainer
from trainloop.checkpoint import BestK

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/vision"))
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--lr", type=float, default=3e-3)
args = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train_set = TensorDataset(images[:1024], labels[:1024])
val_set = TensorDataset(images[1024:], labels[1024:])


class JsonLog(BaseHook):
    def on_log(self, trainer, records, dry_run):
        if trainer.accelerator.is_main_process:
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": trainer.step, **records}) + "\n")


def forward(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, label_smoothing=0.1), {}


def eval_forward(model, batch):
    x, y = batch
    return None, {"accuracy": (model(x).argmax(1) == y).float().mean()}


def main():
    accelerator = Accelerator()
    set_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    train_loader = DataLoader(train_set, batch_size=args.batch_size, drop_last=True)
    val_loader = DataLoader(val_set, batch_size=256)
    steps_per_epoch = len(train_set) // (args.batch_size * accelerator.num_processes)
    total_steps = args.epochs * steps_per_epoch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps + 1)
    model, optimizer, train_loader, scheduler = accelerator.prepare(model, optimizer, train_loader, scheduler)
    hooks = [
        EvaluationHook(steps_per_epoch),
        CheckpointingHook(steps_per_epoch, keep=[BestK("val/accuracy", 1, mode="max")]),
        LoggingHook(interval=1),
        JsonLog(),
    ]
    Trainer(
        model=model,
        optimizer=optimizer,
        data_loader=train_loader,
        eval_data_loader=val_loader,
        forward=forward,
        eval_forward=eval_forward,
        lr_scheduler=scheduler,
        hooks=hooks,
        max_steps=total_steps,
        grad_clip=1.0,
        accelerator=accelerator,
        workspace=args.out,
        seed=0,
    ).train()


if __name__ == "__main__":
    main()
