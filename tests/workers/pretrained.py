"""Trains a small GPT-2 for three steps, with an average and a checkpoint, and writes the whole weights.

Usage: accelerate launch pretrained.py WORKSPACE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook


class Trainer(BaseTrainer):
    def build_data_loader(self) -> Any:
        return DataLoader(torch.randint(50, (16, 8), generator=torch.Generator().manual_seed(0)), batch_size=2)

    def build_model(self) -> Any:
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return [EmaHook(0.5), CheckpointingHook(3)]

    def forward(self, batch: Any) -> Any:
        return self.model(input_ids=batch, labels=batch).loss, {}


trainer = Trainer(3, workspace=sys.argv[1], seed=0)
trainer.train()
state = trainer.state_dict()
whole = {
    group: {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state[group].items()}
    for group in ("model", "ema")
}
if trainer.accelerator.is_main_process:
    torch.save(whole, Path(sys.argv[1], "whole.pt"))
