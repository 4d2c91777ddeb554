"""The same as a subclass: the average of the weights and its samples are hooks."""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, ImageFileLoggerHook, LoggingHook

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/diffusion"))
parser.add_argument("--max_steps", type=int, default=40)
parser.add_argument("--sample_every", type=int, default=20)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--ema_decay", type=float, default=0.95)
args = parser.parse_args()

pixels = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)[:1024] / 8 - 1  # N x 64, in [-1, 1]


class Denoiser(nn.Module):
    """Predicts the velocity from noise to image at a time in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(65, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64))

    def forward(self, x, t):
        return self.net(torch.cat([x, t], dim=1))


@torch.no_grad()
def sample(model, device, count=16, steps=10):
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(0)).to(device)
    for i in range(steps):
        t = torch.full((count, 1), i / steps, device=device)
        x = x + model(x, t) / steps
    return (x.clamp(-1, 1) + 1) / 2


class SampleHook(BaseHook):
    def __init__(self, ema):
        self.ema = ema

    def on_after_step(self, trainer):
        if trainer.step % args.sample_every == 0:
            with self.ema.swapped(trainer):
                samples = sample(trainer.model, trainer.device)
            trainer.log_images({"samples": samples.view(-1, 1, 8, 8)})


class JsonLog(BaseHook):
    def on_log(self, trainer, records, dry_run):
        if trainer.accelerator.is_main_process:
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": trainer.step, **records}) + "\n")


class DiffusionTrainer(BaseTrainer):
    def build_data_loader(self):
        return DataLoader(pixels, batch_size=args.batch_size)

    def build_model(self):
        return Denoiser()

    def build_optimizer(self):
        return torch.optim.Adam(self.model.parameters(), lr=args.lr)

    def build_hooks(self):
        ema = EmaHook(args.ema_decay)
        save = CheckpointingHook(args.sample_every)
        return [ema, SampleHook(ema), ImageFileLoggerHook(), save, LoggingHook(interval=1), JsonLog()]

    def forward(self, x):
        noise = torch.randn_like(x)
        t = torch.rand(len(x), 1, device=x.device)
        velocity = self.model(torch.lerp(noise, x, t), t)
        return nn.functional.mse_loss(velocity, x - noise), {}


if __name__ == "__main__":
    DiffusionTrainer(args.max_steps, grad_clip=1.0, workspace=args.out, seed=0).train()
