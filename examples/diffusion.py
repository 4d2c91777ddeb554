"""Train a diffusion model that writes digits, on a CPU in two minutes: `accelerate launch examples/diffusion.py`.

Start it again, and it goes on where it was stopped; with a higher `--max-steps`, where it ended. The workspace holds
images/ (samples of the averaged weights) and checkpoints/ (the newest, and the best by the loss of these weights).
"""

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import (
    BaseHook,
    BaseTrainer,
    CheckpointingHook,
    EmaHook,
    EvaluationHook,
    ImageFileLoggerHook,
    ProgressHook,
)
from trainloop.checkpoint import BestK

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # N x 1 x 8 x 8, in [-1, 1]
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, held_out = order[360:], order[:360]


class Block(nn.Module):
    """Residual block on N x width x 8 x 8; the condition, N x 128, shifts its channels."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.shift = nn.Linear(128, width)

    def forward(self, x, condition):
        y = self.conv1(nn.functional.silu(self.norm1(x))) + self.shift(condition)[:, :, None, None]
        return x + self.conv2(nn.functional.silu(self.norm2(y)))


class Denoiser(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.angle = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128))
        self.label = nn.Embedding(10, 128)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.block1, self.block2, self.block3 = Block(width), Block(width), Block(width)
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x, angle, label):
        condition = nn.functional.silu(self.angle(angle.flatten(1)) + self.label(label))
        y = self.block1(self.first(x), condition)
        return self.last(self.block3(self.block2(y, condition), condition))


class DiffusionTrainer(BaseTrainer):
    """cos(angle) * image + sin(angle) * noise is an image at angle 0, and noise at pi / 2. The model learns how it
    changes with the angle, which is the "v" of https://arxiv.org/abs/2202.00512.
    """

    def build_data_loader(self):
        return DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)

    def build_eval_data_loader(self):
        return DataLoader(TensorDataset(images[held_out], labels[held_out]), batch_size=64)

    def build_model(self):
        return Denoiser()

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=2e-3)

    def build_hooks(self):
        ema = EmaHook(0.995, warmup="ratio")
        return [
            ProgressHook(interval=250),
            ema,
            EvaluationHook(interval=250, prefix="val"),
            EvaluationHook(interval=250, prefix="val_ema", ema=ema),
            SampleHook(interval=500, ema=ema),
            ImageFileLoggerHook(),
            CheckpointingHook(interval=500, keep=[BestK("val_ema/loss", 2, mode="min")], exit_signals="SIGTERM"),
        ]

    def forward(self, batch):
        image, label = batch
        noise, angle = torch.randn_like(image), math.pi / 2 * torch.rand_like(image[:, :, :1, :1])
        noisy = angle.cos() * image + angle.sin() * noise
        velocity = angle.cos() * noise - angle.sin() * image
        return nn.functional.mse_loss(self.model(noisy, angle, label), velocity), {}


class SampleHook(BaseHook):
    """Logs ten samples of each digit, always from the same noise, with the averaged weights."""

    def __init__(self, interval, ema):
        self.interval, self.ema = interval, ema

    def on_after_step(self, trainer):
        if trainer.step % self.interval == 0 or trainer.step == trainer.max_steps:
            trainer.model.eval()
            with self.ema.swapped(trainer):
                samples = sample(trainer.model, torch.arange(100, device=trainer.device) % 10)
            trainer.model.train()
            trainer.log_images({"samples": nn.functional.interpolate(samples, scale_factor=6.0)})


@torch.no_grad()
def sample(model, label, num_steps=50):
    """Turn noise into images: N labels -> N x 1 x 8 x 8, in [0, 1]."""
    x = torch.randn(len(label), 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(label.device)
    turn = math.pi / 2 / num_steps
    for i in range(num_steps, 0, -1):
        angle = torch.full_like(x[:, :, :1, :1], i * turn)
        x = math.cos(turn) * x - math.sin(turn) * model(x, angle, label)
    return (x / 2 + 0.5).clamp(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=2500, help="steps of the whole run")
    parser.add_argument("--workspace", default="runs/diffusion", help="folder for samples and checkpoints")
    args = parser.parse_args()
    trainer = DiffusionTrainer(args.max_steps, grad_clip=1.0, workspace=args.workspace, seed=0)
    trainer.train()
    trainer.accelerator.print(f"Samples and checkpoints are in {args.workspace}.")
