"""What trainloop costs beside others: `make bench`, `make bench-full`, `make bench-check`, and on a GPU `--gpu`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch

from . import report, suite

FOLDER = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="everything, with the peers; writes into benchmarks/")
    parser.add_argument("--fsdp2", action="store_true", help="only the steps under FSDP2 x 2; a few minutes")
    parser.add_argument("--check", action="store_true", help="a minute: equality and host reads, and never a time")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rounds")
    parser.add_argument("--gpu", action="store_true", help="what it costs on one GPU; minutes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of --gpu; cpu: tiny, to try it out")
    parser.add_argument("--seconds", type=float, default=240, help="how long --gpu may take")
    parser.add_argument("--parts", nargs="+", help="of --gpu: only these, for example GPT deterministic")
    parser.add_argument("--out", type=Path, help="folder of the table and the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    if args.check:
        wrong = suite.check()
        print(
            "\n".join(wrong)
            or "Every system trains the same, trainloop reads at most once a step, and 8 ranks count as they must."
        )
        sys.exit(bool(wrong))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no system is left behind
    if args.gpu:
        measure_gpu(args.out or Path("build", "benchmarks"), args.device, args.seconds, args.parts)
        return
    start = time.monotonic()
    results = suite.Results()
    out = args.out or (FOLDER / "results" if args.full else Path("build", "benchmarks"))
    out.mkdir(parents=True, exist_ok=True)
    try:
        (suite.full if args.full else suite.sharded if args.fsdp2 else suite.quick)(results, args.scale)
    finally:  # one that is ended early has measured something too
        write(results, out, embeds=args.full and args.out is None)
    print(f"\nThat took {(time.monotonic() - start) / 60:.0f} minutes; table and picture are in {out}.")


def measure_gpu(out: Path, device: str, seconds: float, parts: list[str] | None) -> None:
    """Table and JSON of the GPU benchmark, written anew after each part."""
    from .gpu import report as gpu_report
    from .gpu import suite as gpu_suite

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("`--gpu` needs CUDA, and torch sees none. `--device cpu` tries out the benchmark itself, far smaller.")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(min(8, os.cpu_count() or 1))  # of this process, which compares parameters between the turns

    def save(results: gpu_suite.Results) -> None:
        (out / "benchmark.json").write_text(json.dumps(results.as_json()))
        (out / "benchmark.md").write_text(gpu_report.markdown(results))

    plan = gpu_suite.ON_GPU if device == "cuda" else gpu_suite.ON_CPU
    results = gpu_suite.measure(plan, seconds, save, parts)
    print(f"\n{gpu_report.markdown(results)}")


def write(results: suite.Results, out: Path, embeds: bool) -> None:
    """Table and picture; `embeds`: into the README of this folder, too."""
    text = report.markdown(results)
    (out / "table.md").write_text(text)
    print(f"\n{text}")
    if embeds:
        report.embed(FOLDER / "README.md", text)
    if importlib.util.find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed. `pip install 'trainloop-accelerate[bench]'`.")
    else:
        report.picture(results, out / "results.png")


if __name__ == "__main__":
    main()
