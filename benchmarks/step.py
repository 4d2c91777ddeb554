"""What a step costs beside plain loops: `make bench`, or `python benchmarks/step.py --rounds 15`.

Each contender trains the same model on the same batches, in turns, round after round, so that a busy machine slows all
of them alike. Printed is the median over the rounds of the ratio to the bare torch loop of the same round, in CPU time.
`without the check` is trainloop's own loop with what finds and undoes a non-finite gradient taken out: no host read, no
copies of buffers, no control message.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import BaseTrainer
from trainloop.step import StepInfo

CLIP = 1.0


def tiny_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))


def small_tensors() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(200) for layer in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {"tiny MLP": tiny_mlp, "400 small tensors": small_tensors}


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3200, 16, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32)


def endless(batches: Any) -> Iterator[Any]:
    while True:
        yield from batches


def bare_torch(make_model: Callable[[], nn.Module], num_micro: int, device: str) -> Callable[[int], None]:
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = endless(loader())

    def steps(count: int) -> None:
        for _ in range(count):
            for _ in range(num_micro):
                x, y = (t.to(device) for t in next(batches))
                loss = nn.functional.mse_loss(model(x), y)
                (loss / num_micro).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def bare_accelerate(make_model: Callable[[], nn.Module], num_micro: int, device: str) -> Callable[[int], None]:
    accelerator = Accelerator(cpu=device == "cpu", gradient_accumulation_steps=num_micro)
    model = make_model()
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader())
    batches = endless(data)

    def steps(count: int) -> None:
        for _ in range(count * num_micro):
            x, y = next(batches)
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()

    return steps


class Trainer(BaseTrainer):
    make_model: Callable[[], nn.Module]

    def build_data_loader(self) -> Any:
        return loader()

    def build_model(self) -> nn.Module:
        return type(self).make_model()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def forward(self, batch: Any) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), {}


class WithoutCheck(Trainer):
    def _run_step(self) -> None:
        self.step += 1
        self.step_info = StepInfo()
        for hook in self.hooks:
            hook.on_before_step(self)
        self._run_window()
        self._gradients.clip(self._gradients.norm(), float("inf"))  # as torch: multiplied on the device, unseen
        self._optimizer_step()
        for hook in self.hooks:
            hook.on_after_step(self)


def trainloop_steps(cls: type[Trainer], make_model: Any, num_micro: int, device: str) -> Callable[[int], None]:
    trainer_class = type(cls.__name__, (cls,), {"make_model": staticmethod(make_model)})
    wanted = device if device == "cpu" else None
    trainer = trainer_class(0, CLIP, gradient_accumulation_steps=num_micro, device=wanted, seed=0)
    trainer.train()
    if cls is WithoutCheck:
        trainer._buffers.remember = lambda: None

    def steps(count: int) -> None:
        trainer.max_steps += count
        trainer.train()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each contender in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    print(f"{'model':<18} {'accumulation':<13} {'contender':<18} {'ratio':>6}  (quartiles)")
    for name, make_model in MODELS.items():
        for num_micro in (1, 4):
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            contenders = {
                "bare torch": bare_torch(make_model, num_micro, args.device),
                "bare Accelerate": bare_accelerate(make_model, num_micro, args.device),
                "trainloop": trainloop_steps(Trainer, make_model, num_micro, args.device),
                "without the check": trainloop_steps(WithoutCheck, make_model, num_micro, args.device),
            }
            ratios: dict[str, list[float]] = {contender: [] for contender in contenders}
            for round_number in range(args.rounds + 1):
                seconds = {}
                for contender, steps in contenders.items():
                    start = time.process_time()
                    steps(args.steps)
                    if args.device != "cpu":
                        torch.cuda.synchronize()
                    seconds[contender] = time.process_time() - start
                if round_number:  # the first warms up
                    for contender in contenders:
                        ratios[contender].append(seconds[contender] / seconds["bare torch"])
            for contender, values in ratios.items():
                low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
                print(f"{name:<18} {num_micro:<13} {contender:<18} {middle:>6.2f}  ({low:.2f}-{high:.2f})", flush=True)


if __name__ == "__main__":
    main()
