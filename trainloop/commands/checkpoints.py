"""`trainloop checkpoints ls`, `verify`, `export` and `prune`."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import BestK, Checkpoint, EverySeconds, KeepInterval, KeepPrevious, KeepSteps, RetentionPolicy
from ..checkpoint.best import Best
from ..checkpoint.format.catalog import Catalog
from ..checkpoint.tools.export import CONFIG, FILE_SUFFIX, check_output, export, left_out, needed_files
from ..checkpoint.tools.export_accelerate import export_accelerate
from ..checkpoint.tools.export_accelerate import needed_files as accelerate_files
from ..checkpoint.tools.export_peft import export_merged, export_peft, peft_files
from ..checkpoint.tools.pick import pick
from ..checkpoint.tools.prune import plan_pruning, prune
from ..checkpoint.tools.report import listing, listing_json, pruning, size
from ..checkpoint.tools.survey import Select, check_folder, examine, is_one_checkpoint, leftovers, survey
from ..errors import CheckpointError
from .parser import add_command

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add(areas: Any) -> None:
    """Add the commands to the command line.

    Args:
        areas: The subparsers of the whole command line.
    """
    checkpoints = areas.add_parser("checkpoints", help="list, verify, export and prune checkpoints")
    commands = checkpoints.add_subparsers(metavar="COMMAND", required=True)

    ls = add_command(
        commands,
        "ls",
        _ls,
        "a table of the checkpoints in a folder",
        "List the checkpoints of a run from the oldest commit to the newest: step, age, size, health, metrics, and the"
        " rules of the run by which each stays. The sizes of the files are checked; `verify` reads them. Writes nothing"
        " and takes no lock, so it may be called while the run goes on.",
    )
    ls.add_argument("dir", metavar="DIR", type=Path, help="the folder of checkpoints")
    ls.add_argument(
        "--metric",
        metavar="NAME",
        action="append",
        help='show this one, "val/loss"; repeat it for more (default: all that are not under train/)',
    )
    ls.add_argument("--json", action="store_true", help="print JSON; numbers that are not finite are strings there")

    verify = add_command(
        commands,
        "verify",
        _verify,
        "read every byte of checkpoints, and name each file that is not as it was written",
        "Compare every file with the size and the checksum that were taken when it was written: a line a checkpoint,"
        " with each bad file. Writes nothing and takes no lock.",
    )
    verify.add_argument("dir", metavar="DIR", type=Path, help="the folder of checkpoints, or one checkpoint")
    verify.add_argument("--step", metavar="N", type=int, nargs="+", action="extend", help="only these (default: all)")

    out = add_command(
        commands,
        "export",
        _export,
        "write the weights, or their average, as safetensors or for `from_pretrained`; or all for Accelerate",
        "Write one group of tensors so that other software reads it; needs no GPU, and memory for a few MiB only. The"
        " files that it reads are verified first. A PATH that ends in .safetensors becomes one file, for `load_file`"
        " and `load_state_dict`: tied tensors stand in it under each of their names. Any other PATH becomes a folder"
        " for `from_pretrained`, with model/config.json of the checkpoint if the run put one there; of tied tensors it"
        " has the first. --format peft writes the adapters of a model of peft, for `PeftModel.from_pretrained`."
        " --format accelerate writes a folder that `accelerator.load_state` reads, with the optimizer, the schedule and"
        " the random generators of the CPU; these are pickles.",
    )
    formats = ("weights", "peft", "accelerate")
    out.add_argument("--format", choices=formats, default="weights", help="(default: weights)")
    out.add_argument(
        "--merge", action="store_true", help="--format peft: the whole model, with the adapter merged into its weights"
    )
    out.add_argument(
        "--base",
        metavar="MODEL",
        help="--merge: the base model, as `from_pretrained` takes it (default: what the adapter's configuration names)",
    )
    out.add_argument("--adapter", metavar="NAME", help='--format peft: (default: "default", or the only one)')
    out.add_argument(
        "--fsdp2",
        action="store_true",
        help="--format accelerate for a script under FSDP2, with FULL_STATE_DICT (default: one process or DDP)",
    )
    out.add_argument("dir", metavar="DIR", type=Path, help="the folder of checkpoints, or one checkpoint")
    out.add_argument("--step", metavar="N", type=int, help="(default: the newest healthy one that is whole)")
    out.add_argument(
        "--best",
        metavar="METRIC[:min|max]",
        type=Best.parse,
        help="the one with the best value of a metric, as val/loss (default mode: that of the run's BestK, else min)",
    )
    out.add_argument("--group", metavar="NAME", default="model", help="model, ema, ... (default: model)")
    out.add_argument("--output", metavar="PATH", type=Path, help="(default: NAME_step_N.safetensors, here)")
    out.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="cast floats to it; a value that it cannot hold is an error (default: as saved)",
    )
    out.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_num_bytes,
        default="5GB",
        help="of one file in a folder, as 500MB or 2GiB (default: 5GB)",
    )
    out.add_argument("--force", action="store_true", help="replace what is at PATH, if an export wrote it")

    cut = add_command(
        commands,
        "prune",
        _prune,
        "remove the checkpoints that no policy wants",
        "Show what would stay and why, what would go, and how much that frees; --yes removes it. Without a policy, what"
        " the run itself keeps stays. Always stay the newest checkpoint that is whole, and the newest healthy one;"
        " those that are to stay are verified first. Takes the lock of the folder to remove anything: not while a run"
        " uses it.",
    )
    cut.add_argument("dir", metavar="DIR", type=Path, help="the folder of checkpoints")
    cut.add_argument("--keep-previous", metavar="N", type=int, help="keep the N newest before the newest")
    cut.add_argument("--keep-interval", metavar="K", type=int, help="keep the steps that K divides")
    cut.add_argument("--keep-steps", metavar="S,S", type=_steps, help="keep these steps")
    cut.add_argument(
        "--best",
        metavar="METRIC[:K[:min|max]]",
        type=_best,
        action="append",
        default=[],
        help="keep the K (default: 1) with the lowest (default) or highest value; repeat it for other metrics",
    )
    cut.add_argument("--every-seconds", metavar="S", type=float, help="keep one every so many seconds")
    cut.add_argument("--damaged", action="store_true", help="remove damaged ones, too; else they are left alone")
    cut.add_argument(
        "--verify",
        choices=("full", "size"),
        default="full",
        help="how those that stay are verified: read every byte, or only look at sizes (default: full)",
    )
    cut.add_argument("--yes", action="store_true", help="remove; else nothing is changed")


def _ls(options: argparse.Namespace) -> int:
    check_folder(options.dir)
    findings, others = survey(options.dir, "size"), leftovers(options.dir)
    if options.json:
        print(json.dumps(listing_json(findings, others, options.metric), indent=1, allow_nan=False))
        return 0
    lines = listing(findings, others, options.metric, time.time())
    print("\n".join(lines or [f"{options.dir} has no checkpoints yet."]))
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.step is None and is_one_checkpoint(options.dir):
        folders = [options.dir.resolve()]
    else:
        check_folder(options.dir)
        catalog = Catalog(options.dir)
        steps = options.step
        folders = [entry.folder for entry in catalog.entries()] if steps is None else [*map(catalog.explicit, steps)]
    if not folders:
        raise CheckpointError(f"{options.dir} has no checkpoints")
    all_whole = True
    for folder in folders:
        finding = examine(folder, "full")
        if finding is None:
            print(f"{folder.name}: removed meanwhile, by its run")
            continue
        well = f"ok, {finding.state} ({size(finding.num_bytes)})"
        told = f"{finding.state}: {'; '.join(finding.problems)}" if finding.problems else well
        print(f"{folder.name}: {told}", flush=True)
        all_whole = all_whole and not finding.problems
    return 0 if all_whole else 1


def _export(options: argparse.Namespace) -> int:
    if not is_one_checkpoint(options.dir):
        check_folder(options.dir)
    if options.format == "accelerate":
        return _export_accelerate(options)
    if options.fsdp2:
        raise ValueError("--fsdp2 is for --format accelerate")
    if options.format == "peft":
        return _export_peft(options)
    if options.merge or options.base or options.adapter:
        raise ValueError("--merge, --base and --adapter are for --format peft")
    group = options.group
    if options.output is not None:
        check_output(options.output, options.force)  # before anything that takes time
    checkpoint = _pick(options, lambda manifest: needed_files(manifest, group))
    output = options.output or Path(f"{group}_step_{checkpoint.manifest.step:07d}{FILE_SUFFIX}")
    dtype = _DTYPES.get(options.dtype)
    torch.set_num_threads(1)  # on the small pieces of an export, threads would mostly wait for each other
    done = export(checkpoint, group, output, dtype=dtype, max_shard_bytes=options.max_shard_size, force=options.force)
    files = f"{done.num_files} files" if done.num_files > 1 else "1 file"
    print(f"{checkpoint.folder}, {group} -> {output}: {done.num_tensors} tensors, {size(done.num_bytes)}, {files}")
    if output.is_dir() and not (output / CONFIG).exists():
        print(f"{checkpoint.folder} has no model/{CONFIG}: put the model's into {output}.", file=sys.stderr)
    if missing := left_out(checkpoint.manifest):
        print(f"Not in it: {missing}. Load it with `load_state_dict(..., strict=False)`.", file=sys.stderr)
    return 0


def _export_peft(options: argparse.Namespace) -> int:
    group = options.group
    if options.base and not options.merge:
        raise ValueError("--base is for --merge")
    if options.output is not None:
        check_output(options.output, options.force)
    logger = logging.getLogger("trainloop")
    checkpoint = pick(options.dir, options.step, lambda manifest: peft_files(manifest, group), logger)
    dtype = _DTYPES.get(options.dtype)
    output = options.output or Path(f"{'merged' if options.merge else 'adapter'}_step_{checkpoint.manifest.step:07d}")
    given = {"adapter": options.adapter, "dtype": dtype, "force": options.force}
    if options.merge:
        export_merged(checkpoint, group, output, base=options.base, max_shard_bytes=options.max_shard_size, **given)
        print(f"{checkpoint.folder}, {group} -> {output}: the base model with the adapter merged into it")
        return 0
    done, others = export_peft(checkpoint, group, output, **given)
    print(f"{checkpoint.folder}, {group} -> {output}: {done.num_tensors} tensors, {size(done.num_bytes)}")
    if others:
        print(
            f"Trained, but in no adapter: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}.", file=sys.stderr
        )
    return 0


def _export_accelerate(options: argparse.Namespace) -> int:
    if options.group != "model" or options.dtype is not None:
        raise ValueError("--format accelerate takes the whole run as it was saved: without --group and --dtype")
    if options.output is not None:
        check_output(options.output, options.force)
    checkpoint = _pick(options, accelerate_files)
    output = options.output or Path(f"accelerate_step_{checkpoint.manifest.step:07d}")
    done = export_accelerate(checkpoint, output, fsdp2=options.fsdp2, force=options.force)
    print(
        f"{checkpoint.folder} -> {output}: model and optimizer, {size(done.num_bytes)}, for `accelerator.load_state`"
        f" {'under FSDP2 (FULL_STATE_DICT)' if options.fsdp2 else 'in one process or under DDP'}"
    )
    return 0


def _pick(options: argparse.Namespace, select: Select) -> Checkpoint:
    return pick(options.dir, options.step, select, logging.getLogger("trainloop"), options.best)


def _prune(options: argparse.Namespace) -> int:
    check_folder(options.dir)
    policies = _policies(options)
    act = prune if options.yes else plan_pruning
    plan = act(options.dir, policies, verify=options.verify, with_damaged=options.damaged)
    lines = pruning(plan)
    if not lines:
        print(f"{options.dir} has no checkpoints yet.")
        return 0
    print("\n".join(lines))
    whose = "the run's own policies" if policies is None else "the policies given"
    print(
        f"By {whose}: {', '.join(map(repr, plan.policies)) or 'none'}; always the newest and the newest healthy stay."
    )
    num_bytes = sum(finding.num_bytes for finding in plan.go) + sum(item.num_bytes for item in plan.leftovers)
    what = f"{len(plan.go) + len(plan.leftovers)} ({size(num_bytes)})"
    print(f"Removed {what}." if options.yes else f"Would remove {what}. Nothing was removed: --yes does it.")
    return 0


def _policies(options: argparse.Namespace) -> list[RetentionPolicy] | None:
    """The requested policies. None: none were requested."""
    policies: list[RetentionPolicy] = list(options.best)
    if options.keep_previous is not None:
        policies.append(KeepPrevious(options.keep_previous))
    if options.keep_interval is not None:
        policies.append(KeepInterval(options.keep_interval))
    if options.keep_steps is not None:
        policies.append(KeepSteps(options.keep_steps))
    if options.every_seconds is not None:
        policies.append(EverySeconds(options.every_seconds))
    return policies or None


def _num_bytes(text: str) -> int:
    unit = text.lstrip("0123456789.").strip().upper()
    try:
        number = float(text[: len(text) - len(unit)]) if unit else float(text)
        num_bytes = int(number * (_UNITS[unit] if unit else 1))
    except (KeyError, OverflowError, ValueError):
        num_bytes = 0
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"a size must be like 5GB, 500MB or 2GiB, but is {text!r}")
    return num_bytes


def _steps(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"steps must be numbers with commas between, but are {text!r}") from None


def _best(text: str) -> BestK:
    match = re.fullmatch(r"(?P<metric>[^:]+)(:(?P<k>\d+)(:(?P<mode>min|max))?)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be METRIC, METRIC:K, METRIC:K:min or METRIC:K:max, but is {text!r}")
    try:
        return BestK(match["metric"], int(match["k"] or 1), mode="max" if match["mode"] == "max" else "min")
    except ValueError as ex:
        raise argparse.ArgumentTypeError(str(ex)) from ex
