"""Trains on WebDataset's tar files: each rank reads its own files, each sample once an epoch.

Run it with `accelerate launch integrations/data/web_dataset.py "shards/*.tar"`. A sample has `input.npy` and `cls`.
"""

import argparse
import glob
import random

import torch
import webdataset as wds
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from trainloop import BaseTrainer, CheckpointingHook, ProgressHook


class TarFiles(IterableDataset):
    """The samples of this rank's files. The files and the samples are shuffled anew in each epoch."""

    def __init__(self, urls, buffer_size=1000):
        self.urls, self.buffer_size = sorted(urls), buffer_size
        self.epoch = self.rank = 0
        self.world_size = 1

    def shard(self, rank, world_size):  # the trainer calls it before anything is read
        if len(self.urls) % world_size:
            raise ValueError(f"{world_size} processes can't share {len(self.urls)} files evenly.")
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        # Every rank and worker shuffles the list in the same way, and takes its part after that.
        urls = random.Random(self.epoch).sample(self.urls, len(self.urls))[self.rank :: self.world_size]
        rng = random.Random(f"{self.epoch} {self.rank}")
        files = wds.WebDataset(urls, shardshuffle=False, nodesplitter=as_they_are, empty_check=False)
        return iter(files.shuffle(self.buffer_size, rng=rng).decode().to_tuple("input.npy", "cls"))


def as_they_are(urls):
    """The splitter for ranks that does nothing: `TarFiles` has split the files. WebDataset splits them over workers."""
    return urls


class Trainer(BaseTrainer):
    def __init__(self, urls, num_workers=0, **kwargs):
        super().__init__(**kwargs)
        self.urls, self.num_workers = urls, num_workers

    def build_data_loader(self):
        return DataLoader(TarFiles(self.urls), batch_size=4, num_workers=self.num_workers)

    def build_model(self):
        return nn.Linear(4, 10)

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self):
        return [ProgressHook(interval=10), CheckpointingHook(interval=100)]

    def forward(self, batch):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.model(inputs), labels), {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("files", help='a pattern, such as "shards/*.tar"')
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--workspace", default="workspace")
    args = parser.parse_args()
    trainer = Trainer(
        glob.glob(args.files), args.num_workers, max_steps=args.max_steps, workspace=args.workspace, seed=0
    )
    trainer.train()
    trainer.accelerator.end_training()
