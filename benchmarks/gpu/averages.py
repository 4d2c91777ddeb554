"""What one update of an average of the weights takes on a GPU: `python -m benchmarks.gpu.averages`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ..updates import Seconds, average_contenders

CALLS = 20
"""In a row, between two synchronizations."""


def averages(model: str, device: str, num_rounds: int) -> Seconds:
    """Wall seconds of one update, by contender and round, in turns; the first round warms up."""
    contenders = average_contenders(model, device)
    seconds: Seconds = {name: [] for name in contenders}
    for _ in range(num_rounds + 1):
        for name, update in contenders.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                update()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / CALLS)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--models", nargs="+", default=["400 small tensors", "GPT 124M"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, required=True, help="write the result there")
    args = parser.parse_args()
    args.json.write_text(json.dumps({model: averages(model, args.device, args.rounds) for model in args.models}))


if __name__ == "__main__":
    main()
