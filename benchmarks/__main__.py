"""What trainloop costs beside others: `make bench`, `make bench-full`, `make bench-check`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
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
    parser.add_argument("--check", action="store_true", help="a minute: equality and host reads, and never a time")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rounds")
    parser.add_argument("--out", type=Path, help="folder of the table and the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("trainloop").setLevel(logging.ERROR)
    if args.check:
        wrong = suite.check()
        print("\n".join(wrong) or "Every system trains the same, and trainloop reads at most once a step.")
        sys.exit(bool(wrong))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no system is left behind
    start = time.monotonic()
    results = suite.Results()
    out = args.out or (FOLDER / "results" if args.full else Path("build", "benchmarks"))
    out.mkdir(parents=True, exist_ok=True)
    try:
        (suite.full if args.full else suite.quick)(results, args.scale)
    finally:  # one that is ended early has measured something too
        write(results, out, embeds=args.full and args.out is None)
    print(f"\nThat took {(time.monotonic() - start) / 60:.0f} minutes; table and picture are in {out}.")


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
