"""The same on trainloop."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer, CheckpointingHook, EarlyStoppingHook, EvaluationHook, ProgressHook
from trainloop.checkpoint import BestK

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
train_set, val_set = TensorDataset(images[:1408], labels[:1408]), TensorDataset(images[1408:], labels[1408:])


class Digits(BaseTrainer):
    def build_data_loader(self):
        return DataLoader(train_set, batch_size=64, shuffle=True)

    def build_eval_data_loader(self):
        return DataLoader(val_set, batch_size=256)

    def build_model(self):
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def build_lr_scheduler(self):
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=3e-3, total_steps=self.max_steps + 1)

    def build_hooks(self):
        return [
            EvaluationHook(interval=22),
            EarlyStoppingHook("val/loss", patience=5),
            CheckpointingHook(interval=22, keep=[BestK("val/loss", 1)]),
            ProgressHook(interval=22),
        ]

    def forward(self, batch):
        x, y = batch
        logits = self.model(x)
        return nn.functional.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


if __name__ == "__main__":
    Digits(max_steps=220, grad_clip=1.0, workspace="runs/lightning", seed=0).train()
