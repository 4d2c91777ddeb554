"""Train a classifier on scikit-learn's handwritten digits: `accelerate launch examples/digits.py`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer, ProgressHook

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # N x 1 x 8 x 8, in [0, 1]
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, held_out = order[360:], order[:360]


class DigitsTrainer(BaseTrainer):
    def build_data_loader(self):
        return DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)

    def build_model(self):
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
        )  # fmt: skip

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def build_lr_scheduler(self):
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=3e-3, total_steps=self.max_steps + 1)

    def build_hooks(self):
        return [ProgressHook(interval=50, with_records=True)]

    def forward(self, batch):
        x, y = batch
        logits = self.model(x)
        loss = nn.functional.cross_entropy(logits, y)
        return loss, {"accuracy": (logits.argmax(1) == y).float().mean()}


if __name__ == "__main__":
    trainer = DigitsTrainer(max_steps=300, grad_clip=1.0, seed=0)
    trainer.train()

    model = trainer.model.eval()
    with torch.no_grad():
        predicted = model(images[held_out].to(trainer.device)).argmax(1).cpu()
    accuracy = (predicted == labels[held_out]).float().mean().item()
    trainer.accelerator.print(f"accuracy on {len(held_out)} held-out digits: {accuracy:.1%}")
