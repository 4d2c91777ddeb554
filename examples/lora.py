r"""Fine-tune a causal language model with LoRA: the model is frozen in bf16, and checkpoints hold the adapters only.

    accelerate launch --num_processes 1 --mixed_precision bf16 examples/lora.py
    accelerate launch --num_processes 8 --mixed_precision bf16 --use_fsdp --fsdp_version 2 \
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer \
        examples/lora.py --model meta-llama/Llama-3.1-8B --tokenized tokens.pt

Without --model it is a tiny Llama with random weights that reads the source of Python's standard library, byte by byte.
On CPU processes, put `ACCELERATE_USE_CPU=true` in front. Start it again, and it goes on where it was stopped. Then:

    python -m trainloop checkpoints export runs/lora/checkpoints --format peft --output adapter
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from trainloop import BaseTrainer, CheckpointingHook, EmaHook, ProgressHook


def tokens(options):
    """Windows of tokens: a tensor N x length."""
    if options.tokenized:
        return torch.load(options.tokenized, weights_only=True)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    return text[: len(text) // 64 * 64].view(-1, 64)


class LoraTrainer(BaseTrainer):
    def __init__(self, options, **kwargs):
        self.options = options
        super().__init__(**kwargs)

    def build_data_loader(self):
        return DataLoader(tokens(self.options), self.options.batch_size, shuffle=True)

    def build_model(self):
        # The same weights at every start: those of the files, or those of the trainer's seed.
        if self.options.model:
            model = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.bfloat16)
        else:
            config = LlamaConfig(
                vocab_size=256,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=0,
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        adapters = LoraConfig(r=self.options.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return get_peft_model(model, adapters)  # freezes the model; the adapters are fp32

    def build_optimizer(self):
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.options.lr)

    def build_hooks(self):
        return [
            EmaHook(0.99, warmup="ratio"),
            CheckpointingHook(self.options.interval, keep_previous=1, exit_signals="SIGTERM", trainable_only=True),
            ProgressHook(interval=min(10, self.options.interval)),
        ]

    def forward(self, batch):
        return self.model(input_ids=batch, labels=batch).loss, {}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", default="runs/lora", help="folder for checkpoints (default: %(default)s)")
    parser.add_argument("--model", help="a folder or name that `from_pretrained` takes (default: a tiny one)")
    parser.add_argument("--tokenized", help="a tensor N x length of the model's tokens (default: bytes)")
    parser.add_argument("--max-steps", type=int, default=200, help="steps of the whole run (default: %(default)s)")
    parser.add_argument("--interval", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of one process (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    LoraTrainer(options, max_steps=options.max_steps, grad_clip=1.0, workspace=options.workspace, seed=0).train()
