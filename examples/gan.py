"""Train a GAN that writes digits, on a CPU in two minutes: `accelerate launch examples/gan.py`.

It shows phases (the discriminator's and the generator's update of each step), an average of the generator alone, a
learning rate schedule for each, and a run that is limited by epochs. The workspace gets images/ (samples of the
averaged generator) and checkpoints/. Stop it and start it again: it goes on from its last checkpoint.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, ImageFileLoggerHook, ProgressHook

images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # N x 1 x 8 x 8, in [-1, 1]
NOISE = 32


class GanTrainer(BaseTrainer):
    def build_data_loader(self):
        return DataLoader(TensorDataset(images), batch_size=64 // self.accelerator.num_processes, shuffle=True)

    def build_model(self):
        generator = nn.Sequential(
            nn.Linear(NOISE, 128 * 2 * 2), nn.Unflatten(1, (128, 2, 2)), nn.BatchNorm2d(128), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        discriminator = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Flatten(), nn.Linear(128 * 4 * 4, 1),
        )  # fmt: skip
        return {"generator": generator, "discriminator": discriminator}

    def build_optimizer(self):
        return {
            name: torch.optim.Adam(model.parameters(), lr=5e-4, betas=(0.5, 0.999))
            for name, model in self.model.items()
        }

    def build_lr_scheduler(self):
        return {
            name: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.max_steps)
            for name, optimizer in self.optimizer.by_name.items()
        }

    def build_hooks(self):
        ema = EmaHook(0.99, module="generator")
        return [
            ema,
            SampleHook(ema),
            ImageFileLoggerHook(),
            CheckpointingHook("epoch", keep_previous=1, exit_signals="SIGTERM"),
            ProgressHook("epoch", with_records=True),
        ]

    def phases(self):
        return "discriminator", "generator"

    def forward(self, batch):
        (real,) = batch
        fake = self.model["generator"](torch.randn(len(real), NOISE, device=self.device))
        on_fake = self.model["discriminator"](fake)
        if self.phase == "generator":
            return nn.functional.softplus(-on_fake).mean(), {}
        on_real = self.model["discriminator"](real)
        loss = nn.functional.softplus(-on_real).mean() + nn.functional.softplus(on_fake).mean()
        return loss, {"told_apart": ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2}


class SampleHook(BaseHook):
    """Writes the same 64 noises as digits, at the end of each tenth epoch."""

    def __init__(self, ema):
        self.ema = ema
        self.noise = torch.randn(64, NOISE, generator=torch.Generator().manual_seed(0))

    def on_after_step(self, trainer):
        if not (trainer.is_finished or (trainer.is_due("epoch") and trainer.epoch % 10 == 0)):
            return
        generator = trainer.model["generator"]
        with self.ema.swapped(trainer), torch.no_grad():
            generator.eval()
            samples = generator(self.noise.to(trainer.device))  # on every rank: under FSDP2 each holds a part
            generator.train()
        samples = nn.functional.interpolate((samples + 1) / 2, scale_factor=6.0)
        trainer.log_images({"samples": samples})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--max-epochs", type=int, default=60, help="passes over the data")
    parser.add_argument("--workspace", default="runs/gan", help="folder for samples and checkpoints")
    args = parser.parse_args()
    GanTrainer(max_epochs=args.max_epochs, workspace=args.workspace, seed=0).train()
