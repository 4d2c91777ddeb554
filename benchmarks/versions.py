"""A step of this checkout beside one of another commit, in turns: `python -m benchmarks.versions FOLDER`.

FOLDER is a checkout of the other commit, for example `git worktree add build/before b98a30e`. Both run this checkout's
benchmark, so they differ in nothing but the package. The other commit takes part twice: how far its two ratios are from
1 is the noise.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .harness import REPOSITORY, System, quartiles, ratios, run
from .tasks import Task

NUM_STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="FOLDER", help="a checkout of the other commit")
    parser.add_argument("--turns", type=int, default=60, help=f"turns of {NUM_STEPS} steps each")
    args = parser.parse_args()
    if not (args.other / "trainloop" / "trainer.py").is_file():
        parser.error(f"{args.other} is not a checkout of trainloop.")
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder)
        (other / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
        (other / "trainloop").symlink_to(args.other.resolve() / "trainloop")
        systems = [
            System("trainloop", label="other", cwd=other),
            System("trainloop", label="other again", cwd=other),
            System("trainloop", label="this"),
        ]
        print("CPU time of a step, as a ratio to the other commit's in the same round: median (quartiles)")
        for world_size in (1, 2):
            for num_micro in (1, 4):
                task = Task("tiny MLP", num_micro, world_size=world_size, num_steps=NUM_STEPS, num_turns=args.turns)
                measured = run(task, systems)
                name = f"DDP x {world_size}" if world_size > 1 else "1 process"
                for title, system in measured.items():
                    if system.error:
                        raise SystemExit(f"{title} failed: {system.error}")
                reference = measured["other"].cpu
                microseconds = quartiles(reference)[1] / NUM_STEPS / world_size * 1e6
                shown = [
                    f"{title} {middle:.3f} ({low:.3f} to {high:.3f})"
                    for title in ("other again", "this")
                    for low, middle, high in [quartiles(ratios(measured[title].cpu, reference))]
                ]
                print(f"tiny MLP, {name}, accumulation {num_micro}: {', '.join(shown)}; {microseconds:.0f} us a rank")


if __name__ == "__main__":
    main()
