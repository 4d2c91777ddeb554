"""Reads folders of the trainer that this one descends from (trainloop up to 0.11): `checkpoints/1000/`, with one file
per entry of its `state_dict`.

```
model.pt            tensors by name
training_state.pt   {"step", "optimizer": by name, in the form of torch's `get_optimizer_state_dict`,
                     "lr_scheduler": its state or None, "grad_scaler": its state, {} if it was not used}
ema.pt              an average of the weights: tensors by "module." + name, and "n_averaged"
<name>.pt           state of other hooks
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .content import Foreign, ForeignOptimizer, TensorSource, check_whole, is_flat, load_pickle

MODEL, STATE = "model.pt", "training_state.pt"
_UPDATES = "n_averaged"


def open_origin(folder: Path) -> Foreign:
    """Open such a folder.

    Raises:
        CheckpointError: A file cannot be read, or has another form.
    """
    model, state = load_pickle(folder / MODEL), load_pickle(folder / STATE)
    if not is_flat(model) or not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{folder} has {MODEL} and {STATE}, but not with tensors by name and a step in them")
    weights: dict[str, TensorSource] = {"model": check_whole(model, folder / MODEL)}
    hooks: dict[str, Any] = {}
    not_taken = ["random generators and the position in the data, which it has not"]
    for path in sorted(folder.glob("*.pt")):
        if path.name in (MODEL, STATE):
            continue
        average = _average(path)
        if average is None:
            not_taken.append(f"the hook's state in {path.name}")
        else:
            weights[path.stem], num_updates = average
            hooks[f"{path.stem}_hook"] = {"num_updates": num_updates}
    optimizer = state.get("optimizer")
    return Foreign(
        folder,
        "a checkpoint of trainloop before 1.0, or of the trainer that it descends from",
        weights,
        ForeignOptimizer.from_state_dict(optimizer, folder / STATE) if optimizer else None,
        state.get("lr_scheduler"),
        state.get("grad_scaler") or None,
        state["step"],
        hooks=hooks,
        not_taken=tuple(not_taken),
    )


def _average(path: Path) -> tuple[TensorSource, int] | None:
    """An average of the weights and the number of its updates. None: the file contains something else."""
    try:
        saved = load_pickle(path)
    except CheckpointError:
        return None
    if not is_flat(saved) or _UPDATES not in saved:
        return None
    tensors = dict(saved)
    num_updates = int(tensors.pop(_UPDATES))
    return check_whole(tensors, path), num_updates
