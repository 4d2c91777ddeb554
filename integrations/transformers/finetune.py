"""Fine-tunes any causal language model of transformers on text files, and exports it for `from_pretrained`.

accelerate launch --config_file integrations/transformers/fsdp2.yaml integrations/transformers/finetune.py
    --model Qwen/Qwen3-0.6B --text a.txt b.txt --workspace workspace
"""

import argparse
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainloop import BaseTrainer, CheckpointingHook, ProgressHook


class Finetuner(BaseTrainer):
    def __init__(self, args, **kwargs):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        super().__init__(args.max_steps, workspace=args.workspace, grad_clip=1.0, **kwargs)

    def build_data_loader(self):
        text = "\n".join(Path(path).read_text() for path in self.args.text)
        tokens = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        length = self.args.length
        return DataLoader(tokens[: len(tokens) // length * length].view(-1, length), self.args.batch_size, shuffle=True)

    def build_model(self):
        # Accelerate computes in bf16 where it was asked to; the weights that the optimizer updates stay fp32.
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32, use_cache=False)

    def build_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.args.lr)

    def build_hooks(self):
        return [ProgressHook(interval=10), CheckpointingHook(interval=100, exit_signals="SIGTERM")]

    def forward(self, batch):
        return self.model(input_ids=batch, labels=batch).loss, {}

    def export(self, folder):
        """Write weights, config and tokenizer. Call on every rank: the shards are gathered on rank 0."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = self.live_model_state(whole)
        if self.accelerator.is_main_process:
            self.unwrapped_model.save_pretrained(folder, state_dict=state_dict)
            self.tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a name on the hub, or a folder")
    parser.add_argument("--text", nargs="+", required=True, help="files to train on")
    parser.add_argument("--workspace", default="workspace", help="a folder all nodes share")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=4, help="of one process")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--lr", type=float, default=2e-5)
    args = parser.parse_args()
    trainer = Finetuner(args, seed=0)
    trainer.train()
    trainer.export(Path(args.workspace) / "export")
    trainer.accelerator.end_training()  # lets go of the process group, which torch else complains of
