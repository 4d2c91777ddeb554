"""`trainloop evaluate`: evaluates one checkpoint, without training."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ..errors import describe
from ..ranks import collectives
from ..records import map_nested
from ..trainer import BaseTrainer
from .parser import add_command


def add(areas: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        areas,
        "evaluate",
        _evaluate,
        "evaluate a checkpoint of a run, without training",
        "Build a trainer, load the weights of a checkpoint, evaluate, and print the result as JSON (a number that isn't"
        " finite is a string). Start it as you start the training: `accelerate launch OPTIONS -m trainloop evaluate"
        " train:make_trainer best:val/loss`. The folder of checkpoints is not locked, so the run may go on meanwhile.",
    )
    parser.add_argument(
        "make_trainer",
        metavar="MODULE:FUNCTION",
        help="an importable function without arguments that returns the trainer",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help='a step, "latest", "best", "best:val/loss" or "best:val/accuracy:max", of the folder that the trainer'
        " saves into; or the path of a checkpoint, of a folder of checkpoints, or of a file of weights",
    )
    parser.add_argument("--ema", metavar="NAME", help="evaluate this average of the weights")


def _evaluate(options: argparse.Namespace) -> int:
    trainer = _import(options.make_trainer)()
    if not isinstance(trainer, BaseTrainer):
        raise ValueError(f"{options.make_trainer} must return a trainer, but returned {describe(trainer)}")
    which = int(options.checkpoint) if options.checkpoint.isdecimal() else options.checkpoint
    found = trainer.load_weights(which, ema=options.ema)
    try:
        result = trainer.evaluate()
    except (ImportError, OSError, ValueError):  # from the user's code, so the place matters: print the traceback
        traceback.print_exc()
        return 1
    if collectives.rank() == 0:
        print(f"The evaluation of {found}:", file=sys.stderr)
        print(json.dumps(map_nested(str, result, _is_not_finite), indent=1))
    return 0


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _import(name: str) -> Callable[[], Any]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"the trainer must be named as MODULE:FUNCTION, but is {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as ex:
        if ex.name is None or not f"{module_name}.".startswith(f"{ex.name}."):
            raise  # the module itself failed to import something
        raise ValueError(f"there is no module {ex.name!r} here") from ex
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]
