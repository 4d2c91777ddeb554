"""The same on trainloop: the model with its loss stays as it is."""

import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainloop import BaseTrainer, CheckpointingHook, EvaluationHook, ProgressHook
from trainloop.checkpoint import BestK

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)


class Digits(Dataset):
    def __init__(self, part):
        self.images, self.labels = images[part], labels[part]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"x": self.images[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


class DigitsTrainer(BaseTrainer):
    def build_data_loader(self):
        return DataLoader(Digits(slice(0, 1408)), batch_size=64, shuffle=True)

    def build_eval_data_loader(self):
        return DataLoader(Digits(slice(1408, None)), batch_size=256)

    def build_model(self):
        return Classifier()

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.0)

    def build_lr_scheduler(self):
        def cosine(step, warmup=22):
            if step < warmup:
                return step / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.max_steps - warmup)))

        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, cosine)

    def build_hooks(self):
        save = CheckpointingHook(interval=22, keep_previous=1, keep=[BestK("val/accuracy", 1, mode="max")])
        return [EvaluationHook(interval=22), save, ProgressHook(interval=22)]

    def forward(self, batch):
        output = self.model(**batch)
        accuracy = (output["logits"].argmax(1) == batch["labels"]).float().mean()
        return output["loss"], {"accuracy": accuracy}


if __name__ == "__main__":
    DigitsTrainer(max_steps=220, grad_clip=1.0, workspace="runs/transformers", seed=0).train()
