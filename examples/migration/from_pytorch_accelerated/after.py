"""The same on trainloop: from the objects that the script makes."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import CheckpointingHook, EvaluationHook, ProgressHook, Trainer
from trainloop.checkpoint import BestK

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
train_set, val_set = TensorDataset(images[:1408], labels[:1408]), TensorDataset(images[1408:], labels[1408:])


def forward(model, batch):
    x, y = batch
    logits = model(x)
    return nn.functional.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=221)
    Trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        data_loader=DataLoader(train_set, batch_size=64, shuffle=True),
        eval_data_loader=DataLoader(val_set, batch_size=64),
        forward=forward,
        hooks=[
            EvaluationHook(interval=22),
            CheckpointingHook(interval=22, keep=[BestK("val/loss", 1)]),
            ProgressHook(interval=22),
        ],
        max_steps=220,
        grad_clip=1.0,
        workspace="runs/pytorch_accelerated",
        seed=0,
    ).train()
