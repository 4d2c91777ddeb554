"""Reads files that scripts save with `torch.save`: a dict with the model, and an optimizer, a step or an average.

```
denoising-diffusion's Trainer   step model opt ema scaler version        ema: from the package ema_pytorch
DiT                             model ema opt args
nanoGPT                         model optimizer model_args iter_num best_val_loss config
```
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .content import Foreign, ForeignOptimizer, TensorSource, check_whole, is_flat

MODEL = ("state_dict", "model_state_dict", "model", "module")
"""Usual keys for a model's state in a saved dict."""
_OPTIMIZER = ("optimizer", "opt", "optim", "optimizer_state_dict")
_EMA = ("ema", "ema_model", "model_ema", "ema_state_dict")
_STEP = ("step", "global_step", "iter_num", "train_steps", "iteration")
_SCHEDULER = ("lr_scheduler", "scheduler", "scheduler_state_dict", "lr_scheduler_state_dict")
_SCALER = ("scaler", "grad_scaler")
_INNER_EMA = "ema_model."
"""Prefix of the averages in the state of ema_pytorch's `EMA`, which also contains the trained model and counters."""


def open_hand_made(value: Any, path: Path) -> Foreign | None:
    """Open such a file. None: it contains a model's state and nothing else that we know.

    Raises:
        CheckpointError: The content of a part doesn't match its key.
    """
    if not isinstance(value, Mapping) or is_flat(value):
        return None
    model = next((key for key in MODEL if is_flat(value.get(key))), None)
    if model is None:
        return None
    taken = {model}

    def find(keys: tuple[str, ...], fits: Any) -> Any:
        key = next((key for key in keys if key not in taken and fits(value.get(key))), None)
        taken.update([] if key is None else [key])
        return None if key is None else value[key]

    optimizer = find(_OPTIMIZER, lambda v: isinstance(v, Mapping) and {"state", "param_groups"} <= v.keys())
    step, ema = find(_STEP, _is_step), find(_EMA, is_flat)
    if optimizer is None and step is None and ema is None:
        return None
    weights: dict[str, TensorSource] = {"model": check_whole(value[model], path)}
    hooks: dict[str, Any] = {}
    if ema is not None:
        averages, num_updates = _average(ema)
        weights["ema"] = check_whole(averages, path)
        counted = int(step) if step is not None else _num_steps(optimizer)
        hooks["ema_hook"] = {"num_updates": num_updates if num_updates is not None else max(1, counted)}
    scheduler = find(_SCHEDULER, lambda v: isinstance(v, Mapping) and "last_epoch" in v)
    scaler = find(_SCALER, lambda v: isinstance(v, Mapping) and "scale" in v)
    rest = [str(key) for key in value if key not in taken and value[key] is not None]
    return Foreign(
        path,
        "a file that a script has saved by hand",
        weights,
        None if optimizer is None else ForeignOptimizer.from_state_dict(optimizer, path),
        scheduler,
        scaler,
        None if step is None else int(step),
        hooks=hooks,
        not_taken=(
            *([f"what it has under {', '.join(rest)}"] if rest else []),
            "random generators and the position in the data, which it has not",
        ),
    )


def _is_step(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int) and not isinstance(value, bool)


def _num_steps(optimizer: Mapping[str, Any] | None) -> int:
    """The number of steps that an optimizer has counted. 0: it has counted none."""
    states = optimizer["state"].values() if optimizer is not None else ()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _average(saved: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int | None]:
    """The averages by name, and the number of their updates, if known."""
    inner = {key.removeprefix(_INNER_EMA): tensor for key, tensor in saved.items() if key.startswith(_INNER_EMA)}
    if inner:
        return inner, int(saved["step"]) if "step" in saved else None
    averages = dict(saved)
    num_updates = averages.pop("n_averaged", None)  # torch's `AveragedModel`
    return averages, None if num_updates is None else int(num_updates)
