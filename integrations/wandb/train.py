"""One run of the sweep in sweep.yaml. By hand: `accelerate launch integrations/wandb/train.py --lr 0.01 --width 32`."""

import argparse
import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer, CheckpointingHook, LoggingHook, ProgressHook, WandbHook

generator = torch.Generator().manual_seed(0)
x = 4 * torch.rand(1200, 2, generator=generator) - 2
y = torch.sin(2 * x[:, :1]) * x[:, 1:] + 0.05 * torch.randn(1200, 1, generator=generator)


class SurfaceTrainer(BaseTrainer):
    def __init__(self, args, **kwargs):
        super().__init__(**kwargs)
        self.args = args

    def build_data_loader(self):
        return DataLoader(TensorDataset(x[200:], y[200:]), batch_size=50, shuffle=True)

    def build_model(self):
        width = self.args.width
        return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.args.lr)

    def build_hooks(self):
        # A preempted run is marked as such; the sweep starts it again under the same id, and it goes on.
        checkpointing = CheckpointingHook(interval=100, exit_signals="SIGTERM")
        wandb = WandbHook(project=None, config=vars(self.args))  # the agent says which project
        return [ProgressHook(interval=100), LoggingHook(interval=10), checkpointing, wandb]

    def forward(self, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(self.model(inputs), targets), {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--max_steps", type=int, default=400)
    args = parser.parse_args()

    run_id = os.environ.get("WANDB_RUN_ID", "by-hand")  # of the agent: each run has a workspace of its own
    workspace = Path("runs", "wandb-sweep", run_id)
    trainer = SurfaceTrainer(args, max_steps=args.max_steps, grad_clip=1.0, seed=0, workspace=workspace)
    trainer.train()

    model = trainer.model.eval()
    with torch.no_grad():
        loss = nn.functional.mse_loss(model(x[:200].to(trainer.device)), y[:200].to(trainer.device))
    trainer.log({"val": {"loss": loss}})
