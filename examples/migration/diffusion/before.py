"""A diffusion model of digits with Accelerate by hand: `cycle(loader)`, an average of the weights, grids of samples."""

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/diffusion"))
parser.add_argument("--max_steps", type=int, default=40)
parser.add_argument("--sample_every", type=int, default=20)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--ema_decay", type=float, default=0.95)
args = parser.parse_args()

pixels = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)[:1024] / 8 - 1  # N x 64, in [-1, 1]


def cycle(loader):
    while True:
        yield from loader


class Denoiser(nn.Module):
    """Predicts the velocity from noise to image at a time in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(65, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64))

    def forward(self, x, t):
        return self.net(torch.cat([x, t], dim=1))


class EMA:
    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.has_begun = False

    @torch.no_grad()
    def update(self, model):
        for average, param in zip(self.model.parameters(), model.parameters(), strict=True):
            if self.has_begun:
                average.lerp_(param, 1 - self.decay)
            else:
                average.copy_(param)
        self.has_begun = True


@torch.no_grad()
def sample(model, device, count=16, steps=10):
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(0)).to(device)
    for i in range(steps):
        t = torch.full((count, 1), i / steps, device=device)
        x = x + model(x, t) / steps
    return (x.clamp(-1, 1) + 1) / 2


def save_grid(samples, path, columns=4):
    rows = samples.cpu().view(-1, columns, 8, 8).permute(0, 2, 1, 3).reshape(-1, columns * 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rows * 255).round().to(torch.uint8).numpy()).save(path)


def log(accelerator, row):
    if accelerator.is_main_process:
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def main():
    accelerator = Accelerator()
    set_seed(0)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    loader = DataLoader(pixels, batch_size=args.batch_size, generator=torch.Generator())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = EMA(accelerator.unwrap_model(model), args.ema_decay)

    args.out.mkdir(parents=True, exist_ok=True)
    set_seed(0, device_specific=True)
    batches = cycle(loader)
    for step in range(1, args.max_steps + 1):
        x = next(batches)
        noise = torch.randn_like(x)
        t = torch.rand(len(x), 1, device=x.device)
        velocity = model(torch.lerp(noise, x, t), t)
        loss = nn.functional.mse_loss(velocity, x - noise)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(accelerator.unwrap_model(model))
        mean_loss = accelerator.reduce(loss.detach(), reduction="mean").item()
        log(accelerator, {"step": step, "loss": mean_loss, "lr": args.lr})
        if accelerator.is_main_process and step % args.sample_every == 0:
            save_grid(sample(ema.model, accelerator.device), args.out / f"samples/{step}.png")
            torch.save({"model": ema.model.state_dict(), "step": step}, args.out / "ema.pt")
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
