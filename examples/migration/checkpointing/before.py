"""Digits with Accelerate by hand: `save_state` every so often, `load_state` and `skip_first_batches` after a crash."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/checkpointing"))
parser.add_argument("--max_steps", type=int, default=24)
parser.add_argument("--stop_at", type=int, default=None, help="leave after this step, as a crash would")
parser.add_argument("--save_every", type=int, default=4)
parser.add_argument("--resume", default=None, help="'latest' or a folder")
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--lr", type=float, default=3e-3)
args = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1)[:1024] / 16
labels = torch.tensor(digits.target)[:1024]


def log(accelerator, row):
    if accelerator.is_main_process:
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def main():
    accelerator = Accelerator()
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(TensorDataset(images, labels), batch_size=args.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.max_steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    step = 0
    resume_from = args.resume
    if resume_from == "latest":
        folders = sorted(args.out.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
        resume_from = folders[-1] if folders else None
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        step = int(Path(resume_from).name.split("_")[1])
    first_epoch, num_seen = divmod(step, len(loader))

    args.out.mkdir(parents=True, exist_ok=True)
    epoch = first_epoch
    while step < args.max_steps:
        batches = skip_first_batches(loader, num_seen) if epoch == first_epoch and num_seen else loader
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            mean_loss = accelerator.reduce(loss.detach(), reduction="mean").item()
            log(accelerator, {"step": step, "loss": mean_loss, "lr": lr})
            if step % args.save_every == 0:
                accelerator.save_state(str(args.out / f"step_{step}"))
                folders = sorted(args.out.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
                if accelerator.is_main_process:
                    for folder in folders[:-2]:
                        shutil.rmtree(folder)
                accelerator.wait_for_everyone()
            if step == args.max_steps or step == args.stop_at:
                return
        epoch += 1


if __name__ == "__main__":
    main()
