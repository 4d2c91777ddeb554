"""Digits on pytorch-accelerated."""

from functools import partial

import torch
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import SaveBestModelCallback
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
train_set, val_set = TensorDataset(images[:1408], labels[:1408]), TensorDataset(images[1408:], labels[1408:])


class DigitsTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        x, y = batch
        return {"loss": self.loss_func(self.model(x), y), "model_outputs": None, "batch_size": len(y)}

    def calculate_eval_batch_loss(self, batch):
        x, y = batch
        with torch.no_grad():
            logits = self.model(x)
        accuracy = (logits.argmax(1) == y).float().mean()
        self.run_history.update_metric("accuracy", self.gather(accuracy).mean().item())
        return {"loss": self.loss_func(logits, y), "model_outputs": logits, "batch_size": len(y)}


if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = partial(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=3e-3,
        epochs=TrainerPlaceholderValues.NUM_EPOCHS,
        steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    )
    trainer = DigitsTrainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=(*DEFAULT_CALLBACKS, SaveBestModelCallback(save_path="best_model.pt")),
    )
    trainer.train(
        train_set,
        num_epochs=10,
        eval_dataset=val_set,
        per_device_batch_size=64,
        gradient_clip_value=1.0,
        create_scheduler_fn=scheduler,
    )
