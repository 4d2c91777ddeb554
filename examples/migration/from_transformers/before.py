"""Digits on transformers' Trainer."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

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


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    Trainer(
        model=Classifier(),
        args=TrainingArguments(
            output_dir="runs/transformers",
            max_steps=220,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=22,
            max_grad_norm=1.0,
            logging_steps=22,
            eval_strategy="steps",
            eval_steps=22,
            save_strategy="steps",
            save_steps=22,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to="none",
            seed=0,
        ),
        train_dataset=Digits(slice(0, 1408)),
        eval_dataset=Digits(slice(1408, None)),
        compute_metrics=compute_metrics,
    ).train()
