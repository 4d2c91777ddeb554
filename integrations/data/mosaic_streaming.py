"""Trains on MosaicML Streaming's shards: each rank reads its own, and a resume goes on where it stood.

Run it with `accelerate launch integrations/data/mosaic_streaming.py shards/`. A sample has `input` and `label`.
"""

import argparse

import torch
from streaming import StreamingDataLoader, StreamingDataset
from torch import nn

from trainloop import BaseTrainer, CheckpointingHook, ProgressHook
from trainloop.data import per_rank


class Trainer(BaseTrainer):
    def __init__(self, folder, num_workers=0, **kwargs):
        super().__init__(**kwargs)
        self.folder, self.num_workers = folder, num_workers

    def build_data_loader(self):
        # The data set reads rank and world size from the launcher's environment, and counts its epochs itself.
        self.accelerator.wait_for_everyone()
        dataset = StreamingDataset(
            local=self.folder, batch_size=4, shuffle=True, shuffle_seed=self.seed, num_canonical_nodes=1
        )
        return per_rank(StreamingDataLoader(dataset, batch_size=4, num_workers=self.num_workers))

    def build_model(self):
        return nn.Linear(4, 10)

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self):
        return [ProgressHook(interval=10), CheckpointingHook(interval=100)]

    def forward(self, batch):
        return nn.functional.cross_entropy(self.model(batch["input"]), batch["label"]), {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--workspace", default="workspace")
    args = parser.parse_args()
    trainer = Trainer(args.folder, args.num_workers, max_steps=args.max_steps, workspace=args.workspace, seed=0)
    trainer.train()
    trainer.accelerator.end_training()
