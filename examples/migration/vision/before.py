"""Digits with Accelerate by hand: OneCycle, `accelerator.prepare(scheduler)`, validation, the best weights saved."""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


def log(accelerator, row):
    if accelerator.is_main_process:
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


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
    total_steps = args.epochs * (len(train_set) // args.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps + 1)
    model, optimizer, train_loader, val_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, val_loader, scheduler
    )

    args.out.mkdir(parents=True, exist_ok=True)
    step = 0
    best = 0.0
    for epoch in range(args.epochs):
        model.train()
        for x, y in train_loader:
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            mean_loss = accelerator.reduce(loss.detach(), reduction="mean").item()
            log(accelerator, {"step": step, "loss": mean_loss, "lr": lr})
        model.eval()
        correct = total = 0
        for x, y in val_loader:
            with torch.no_grad():
                predicted = model(x).argmax(1)
            predicted, y = accelerator.gather_for_metrics((predicted, y))
            correct += (predicted == y).sum().item()
            total += len(y)
        accuracy = correct / total
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.4f}")
        log(accelerator, {"step": step, "accuracy": accuracy})
        if accuracy > best:
            best = accuracy
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                torch.save(accelerator.unwrap_model(model).state_dict(), args.out / "best.pt")


if __name__ == "__main__":
    main()
