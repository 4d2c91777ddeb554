r"""Pre-train a small GPT on the source of Python's standard library, byte by byte.

    accelerate launch --num_processes 1 examples/language_model.py
    accelerate launch --num_processes 8 --mixed_precision bf16 --use_fsdp --fsdp_version 2 \
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap Block \
        examples/language_model.py --width 768 --depth 12 --batch-size 16 --compile

On CPU processes, put `ACCELERATE_USE_CPU=true` in front. Start it again, and it goes on where it was stopped. The
workspace holds tokens/, the bytes of the library, and checkpoints/: the newest, the one before, and the best by the
loss of the averaged weights.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from trainloop import BaseHook, BaseTrainer, CheckpointingHook, EmaHook, EvaluationHook, ProgressHook
from trainloop.checkpoint import BestK
from trainloop.data import TokenDataset, write_tokens

VOCABULARY = 256  # bytes
END = 0  # no byte of a source file: it comes after each text


def source_files(is_held_out):
    """The library's modules in an order that is the same everywhere; every twentieth is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file for i, file in enumerate(files) if (i % 20 == 0) == is_held_out]


class Block(nn.Module):
    """What FSDP2 gathers, and activation checkpointing computes again, as one: N x length x width."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """N x length bytes -> N x length x VOCABULARY logits of the next ones."""

    def __init__(self, length, width, depth):
        super().__init__()
        self.byte, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for name, param in self.named_parameters():
            if param.dim() == 2:  # what adds to the stream is smaller the deeper the model is
                adds = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * depth) if adds else 0.02)

    def forward(self, ids):
        x = self.byte(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LanguageModelTrainer(BaseTrainer):
    def __init__(self, options, **kwargs):
        self.options = options
        super().__init__(**kwargs)

    def build_data_loader(self):
        return DataLoader(self.windows("training"), self.options.batch_size, shuffle=True)

    def build_eval_data_loader(self):
        windows = self.windows("held_out")
        return DataLoader(Subset(windows, range(min(512, len(windows)))), self.options.batch_size)

    def windows(self, part):
        folder = self.workspace / "tokens" / part
        with self.accelerator.main_process_first():
            if not folder.exists():  # it is whole, or not there
                write_tokens(source_files(part == "held_out"), folder, separator=END)
        return TokenDataset(folder, self.options.length, vocab_size=VOCABULARY)

    def build_model(self):
        model = GPT(self.options.length, self.options.width, self.options.depth)
        if self.options.compile:
            for block in model.blocks:
                block.compile()  # in place, a layer at a time: names stay as they are, and FSDP2 wraps the layers
        return model

    def build_optimizer(self):
        params = list(self.model.parameters())
        groups = [
            {"name": "matrices", "params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
            {"name": "vectors", "params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.options.lr, betas=(0.9, 0.95))

    def build_lr_scheduler(self):
        def factor(step, warmup=100):
            progress = min(1.0, max(0.0, (step - warmup) / max(1, self.max_steps - warmup)))
            return min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def build_hooks(self):
        interval, ema = self.options.interval, EmaHook(0.999, warmup="ratio")
        return [
            ProgressHook(interval=min(50, interval), with_records=True),
            ema,
            EvaluationHook(interval, prefix="val"),
            EvaluationHook(interval, prefix="val_ema", ema=ema),
            SampleHook(interval, ema),
            CheckpointingHook(
                interval, keep_previous=1, keep=[BestK("val_ema/loss")], exit_signals="SIGTERM", async_save=True
            ),
        ]

    def batch_weight(self, batch):
        return (batch[:, 1:] != END).sum()  # targets: the step's loss is the mean over all of them, on all ranks

    def forward(self, batch):
        targets = batch[:, 1:].masked_fill(batch[:, 1:] == END, -100)
        logits = self.model(batch[:, :-1]).float()  # under FSDP2 in bf16 they are bf16
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, {"bits_per_byte": loss.detach() / math.log(2)}


class SampleHook(BaseHook):
    """Logs a text that the averaged weights write. All ranks write the same, since under FSDP2 each must take part."""

    def __init__(self, interval, ema, num_bytes=120):
        self.interval, self.ema, self.num_bytes = interval, ema, num_bytes

    @torch.no_grad()
    def on_after_step(self, trainer):
        if trainer.step % self.interval and trainer.step != trainer.max_steps:
            return
        generator = torch.Generator().manual_seed(trainer.step)  # one of its own: the run's noise goes on as it would
        length, ids = trainer.options.length, torch.full((1, 1), END)
        trainer.model.eval()
        with self.ema.swapped(trainer):
            for _ in range(self.num_bytes):
                window = nn.functional.pad(ids[:, -length:], (0, max(0, length - ids.shape[1])))
                last = min(length, ids.shape[1]) - 1
                logits = trainer.model(window.to(trainer.device))[0, last].float().cpu()
                ids = torch.cat([ids, torch.multinomial(logits.softmax(0), 1, generator=generator)[None]], dim=1)
        trainer.model.train()
        text = bytes(byte for byte in ids[0].tolist() if byte != END).decode(errors="replace")
        trainer.logger.info(f"step {trainer.step}/{trainer.max_steps} | sample:\n{printable(text)}")


def printable(text):
    """Text whose control characters are written as codes, since they would garble the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def make_trainer(workspace=None):
    """Make the trainer from the command line, or for `trainloop prove examples/language_model.py:make_trainer`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workspace", default="runs/language_model", help="folder for tokens and checkpoints (default: %(default)s)"
    )
    parser.add_argument("--max-steps", type=int, default=2000, help="steps of the whole run (default: %(default)s)")
    parser.add_argument(
        "--interval",
        type=int,
        default=250,
        help="steps between evaluations, samples, checkpoints (default: %(default)s)",
    )
    parser.add_argument("--accumulation", type=int, help="micro-batches a step (default: as launched)")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="of one process and micro-batch (default: %(default)s)"
    )
    parser.add_argument("--length", type=int, default=256, help="bytes that the model sees (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=4, help="number of blocks (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    options = parser.parse_args([] if workspace else None)
    return LanguageModelTrainer(
        options,
        max_steps=options.max_steps,
        grad_clip=1.0,
        max_non_finite_grad_retries=10,
        gradient_accumulation_steps=options.accumulation,
        workspace=workspace or options.workspace,
        seed=0,
    )


if __name__ == "__main__":
    trainer = make_trainer()
    trainer.train()
    trainer.accelerator.print(f"Checkpoints are in {trainer.workspace}.")
