"""The same: `accelerate launch` says what the script no longer does."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer, CheckpointingHook, EmaHook, ProgressHook

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))


class DigitsTrainer(BaseTrainer):
    def build_data_loader(self):
        return DataLoader(data, batch_size=64, shuffle=True)

    def build_model(self):
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def build_lr_scheduler(self):
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=3e-3, total_steps=self.max_steps + 1)

    def build_hooks(self):
        return [EmaHook(0.99), CheckpointingHook(50), ProgressHook(interval=50)]

    def forward(self, batch):
        x, y = batch
        logits = self.model(x)
        return nn.functional.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


if __name__ == "__main__":
    DigitsTrainer(max_steps=220, grad_clip=1.0, workspace="runs/origin", seed=0).train()
