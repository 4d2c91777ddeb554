"""How the cost of a run grows with its ranks, as counts: `make bench-scale`.

Usage: python -m benchmarks.scale [--write]
Up to 4,096 ranks without a process group: the plan of a save is the same on every rank, so one process can make it for
any number of them. Up to 32 ranks with real processes, see `benchmarks.real_ranks`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainloop.checkpoint.content import Described
from trainloop.checkpoint.format.dtypes import DTYPES
from trainloop.checkpoint.format.layout import Manifest, manifest_texts, state_file, tensors_beside
from trainloop.checkpoint.format.rules import shard_file
from trainloop.checkpoint.format.tables import FileRecord
from trainloop.checkpoint.placement import Layout
from trainloop.checkpoint.save.plan import Plan, make_plan

from . import real_ranks, report

RANKS = (8, 64, 512, 4096)
REAL_RANKS = (2, 8, 16, 32)
BEGIN, END = "<!-- scale results -->", "<!-- end of scale results -->"


@dataclass(frozen=True)
class Model:
    """A decoder: the shapes of its parameters."""

    width: int = 4096
    num_layers: int = 40
    num_words: int = 128_000

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name. The standard one has 10 billion elements in 362 tensors."""
        d, h = self.width, 11 * self.width // 4
        layer: dict[str, tuple[int, ...]] = {
            **{f"attention.{name}.weight": (d, d) for name in ("query", "key", "value", "out")},
            "mlp.gate.weight": (h, d),
            "mlp.up.weight": (h, d),
            "mlp.down.weight": (d, h),
            "attention.norm.weight": (d,),
            "mlp.norm.weight": (d,),
        }
        layers = {f"layers.{i}.{name}": shape for i in range(self.num_layers) for name, shape in layer.items()}
        return {"embedding.weight": (self.num_words, d), **layers, "norm.weight": (d,)}


def fsdp(num_ranks: int) -> Layout:
    """Every tensor is cut over all ranks."""
    return Layout((num_ranks,), (1,), (0,))


def hsdp(num_replicas: int, num_shards: int) -> Layout:
    """Every tensor is cut over `num_shards` ranks, and so many groups of them hold the same."""
    if num_replicas == 1:
        return fsdp(num_shards)
    return Layout((num_replicas, num_shards), (num_shards, 1), (None, 0))


def described(shapes: Mapping[str, tuple[int, ...]], layout: Layout | None) -> Described:
    """What a run with AdamW saves. None: under DDP, where each rank holds everything."""
    moments = itertools.product(shapes.items(), ("exp_avg", "exp_avg_sq"))
    return {
        "model": {name: ("float32", shape, layout) for name, shape in shapes.items()},
        "optim": {
            **{f"{name}/{key}": ("float32", shape, layout) for (name, shape), key in moments},
            **{f"{name}/step": ("float32", (), None) for name in shapes},
        },
    }


def plan_for(shapes: Mapping[str, tuple[int, ...]], layout: Layout | None, num_ranks: int) -> Plan:
    """The plan of a save."""
    return make_plan(described(shapes, layout), ["model"], {"model": {}, "optim": {}}, (), (), num_ranks)


def bytes_written(plan: Plan, num_ranks: int) -> list[int]:
    """Bytes of tensors that each rank writes, counted part by part."""
    written = [0] * num_ranks
    for name, rank in plan.weights["model"].items():
        written[rank] += plan.tensors["model"][name].num_bytes()
    ranks = {shard_file("optim", rank): rank for rank in range(num_ranks)}
    for record in plan.tensors["optim"].values():
        for part in record.parts():
            written[ranks[part.file]] += math.prod(part.shape) * DTYPES[record.dtype].itemsize
    return written


def files_opened(plan: Plan, layout: Layout, rank: int) -> Counter[str]:
    """How many files a rank of another layout opens to read its part, by group."""
    paths = {
        part.file
        for name, record in plan.tensors["model"].items()
        for part in record.parts_in(layout.box_of(rank, record.shape))
    }
    for name, record in plan.tensors["optim"].items():
        box = layout.box_of(rank, record.shape) if not name.endswith("/step") else ((), ())
        paths |= {part.file for part in record.parts_in(box)}
    return Counter(path.split("/")[0] for path in paths)


def manifest_for(plan: Plan, num_ranks: int) -> Manifest:
    """The manifest of a checkpoint by this plan; what it says of the files' bytes is made up."""
    return Manifest(
        step=1000,
        seq=1,
        run_id="0" * 32,
        time=0.0,
        world_size=num_ranks,
        health=True,
        metrics={f"val/metric_{i}": i / 7 for i in range(20)},
        num_bytes=0,
        versions={"torch": "2.13.0"},
        files={path: FileRecord(10**12, 10**9) for path in _paths(plan, num_ranks)},
        tensors=plan.tensors,
    )


def _paths(plan: Plan, num_ranks: int) -> Iterator[str]:
    records = (record for group in plan.tensors.values() for record in group.values())
    yield from dict.fromkeys(part.file for record in records for part in record.chunks)
    for rank in range(num_ranks):
        yield shard_file("optim", rank)
        yield state_file(rank)
        yield tensors_beside(state_file(rank))
    yield state_file(None)


def thousand() -> dict[str, tuple[int, ...]]:
    """A thousand parameters."""
    return {f"layers.{i}.block.weight": (4096, 4096) if i % 4 else (4096,) for i in range(1000)}


def slope(counts: Mapping[int, float]) -> float:
    """By which power of the ranks a count grows, between the two largest numbers of ranks."""
    (n, a), (m, b) = sorted(counts.items())[-2:]
    return math.log(b / a) / math.log(m / n)


def planned() -> dict[str, dict[int, float]]:
    """What one process can count for any number of ranks."""
    shapes, many = Model().shapes(), thousand()
    laws: dict[str, dict[int, float]] = {}
    for n in RANKS:
        plan = plan_for(many, fsdp(n), n)
        head, tables = manifest_texts(manifest_for(plan, n))
        laws.setdefault("manifest.json of 1,000 parameters, bytes", {})[n] = len(head)
        laws.setdefault("tables.json of 1,000 parameters, bytes", {})[n] = len(tables)
        opened = [files_opened(plan, fsdp(3 * n // 4), rank) for rank in (0, n // 3, 3 * n // 4 - 1)]
        laws.setdefault("optimizer's files that a rank opens, N -> 3/4 N", {})[n] = max(o["optim"] for o in opened)
        laws.setdefault("files of weights that a rank opens", {})[n] = max(o["model"] for o in opened)
        written = bytes_written(plan_for(shapes, hsdp(n // 8, 8), n), n)
        laws.setdefault("GB the busiest rank writes, 10B, HSDP N/8 x 8", {})[n] = max(written) / 1e9
        laws.setdefault("that in means of all ranks", {})[n] = max(written) * n / sum(written)
        laws.setdefault("the largest weight in means", {})[n] = (
            4 * math.prod(shapes["embedding.weight"]) * n / sum(written)
        )
        written.sort()
        laws.setdefault("the second busiest rank in means", {})[n] = written[-2] * n / sum(written)
    return laws


def counted() -> dict[str, dict[int, float]]:
    """What real processes count, each under its `real_ranks.enough_descriptors`."""
    laws: dict[str, dict[int, float]] = {}
    for n in REAL_RANKS:
        print(f"{n} processes", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            limit = real_ranks.enough_descriptors(n)
            for name, count in {**real_ranks.run(n, Path(folder), limit), "`ulimit -n` of this run": limit}.items():
                laws.setdefault(name, {})[n] = count
    return laws


def as_table(laws: Mapping[str, Mapping[int, float]], ranks: tuple[int, ...]) -> str:
    """In Markdown. The last column says by which power of N a count grows at the end."""
    rows = [
        [name, *(_shown(counts[n]) for n in ranks), f"{slope(counts):.2f}" if min(counts.values()) > 0 else ""]
        for name, counts in laws.items()
    ]
    return report.table(["ranks", *(f"{n:,}" for n in ranks), "N to the"], rows)


def _shown(count: float) -> str:
    return f"{count:,.4g}" if count < 1e4 else f"{count:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    args = parser.parse_args()
    plans, processes = as_table(planned(), RANKS), as_table(counted(), REAL_RANKS)
    text = f"Plans and manifests, in one process:\n\n{plans}\n\nReal processes under FSDP2:\n\n{processes}"
    print(text)
    if args.write:
        readme = Path(__file__).parent / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
