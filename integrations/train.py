"""Stands for your script in the launch files beside it: a small transformer on Python's own text, which resumes."""

import argparse
import inspect
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer, CheckpointingHook, ProgressHook

LENGTH = 64


class Block(nn.Module):
    """What FSDP2 gathers at a time: the launch files name it under `fsdp_transformer_layer_cls_to_wrap`."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.layer(x, src_mask=mask, is_causal=True)


class Trainer(BaseTrainer):
    def build_data_loader(self):
        text = torch.tensor(list(inspect.getsource(argparse).encode()))
        blocks = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
        return DataLoader(TensorDataset(blocks), batch_size=4, shuffle=True)

    def build_model(self):
        return nn.Sequential(nn.Embedding(256, 32), Block(32), Block(32), nn.Linear(32, 256))

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def build_hooks(self):
        # At SIGTERM all ranks save after the same step and exit with 143: whoever started them starts them again.
        return [ProgressHook(interval=10), CheckpointingHook(interval=10, exit_signals="SIGTERM", keep_previous=1)]

    def forward(self, batch):
        logits = self.model(batch[0][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten()), {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--workspace", default=os.environ.get("WORKSPACE", "workspace"), help="a folder all nodes share"
    )
    parser.add_argument("--max_steps", type=int, default=1000)
    args = parser.parse_args()
    trainer = Trainer(args.max_steps, grad_clip=1.0, workspace=args.workspace, seed=0, timeout=600)
    trainer.train()
    trainer.accelerator.print(f"finished at step {trainer.step}")
    trainer.accelerator.end_training()  # lets go of the process group, which torch else complains of
