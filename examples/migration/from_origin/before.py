"""Digits on the trainer that this one descends from (trainloop 0.11): devices, shards and epochs are yours."""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trainloop import BaseTrainer, CheckpointingHook, EMAHook, ProgressHook

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))
is_distributed = "WORLD_SIZE" in os.environ
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"


def cycle(loader):
    epoch = 0
    while True:
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


class DigitsTrainer(BaseTrainer):
    def build_data_loader(self):
        sampler = DistributedSampler(data) if is_distributed else None
        return cycle(DataLoader(data, batch_size=64, sampler=sampler, shuffle=sampler is None))

    def build_model(self):
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(self.device)
        return nn.parallel.DistributedDataParallel(model) if is_distributed else model

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def build_lr_scheduler(self):
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=3e-3, total_steps=self.max_steps + 1)

    def build_hooks(self):
        return [EMAHook(0.99), CheckpointingHook(50), ProgressHook(interval=50)]

    def forward(self, input):
        x, y = (tensor.to(self.device) for tensor in input)
        logits = self.model(x)
        return nn.functional.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean().item()}


if __name__ == "__main__":
    if is_distributed:
        dist.init_process_group()
    torch.manual_seed(0)
    DigitsTrainer(max_steps=220, grad_clip=1.0, workspace="runs/origin", device=device).train()
