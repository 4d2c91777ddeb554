"""Reads folders that `accelerator.save_state` has written.

```
model.safetensors | pytorch_model.bin            one process, DDP
pytorch_model_fsdp.bin                           FSDP2, full state dict
pytorch_model_fsdp_0/                            FSDP2, sharded state dict: a DCP folder
optimizer.bin | optimizer_0/                     by the parameters' positions in the groups; under FSDP2 by name
scheduler.bin scaler.pt                          if there were any
random_states_{rank}.pkl sampler.bin dl_state_dict.bin custom_checkpoint_{i}.pkl      not read
```
"""

from __future__ import annotations

from pathlib import Path

from ...errors import CheckpointError
from .content import Foreign, ForeignOptimizer, TensorSource, check_whole, load_pickle
from .dcp import DcpFolder, open_optimizer
from .weights import find_weights

SHARDED, FULL = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"
_NOT_TAKEN = {
    "random_states_*.pkl": "random generators (random_states_*.pkl, of Accelerate's own form)",
    "sampler*.bin": "the order of the data (sampler.bin, a pickled object)",
    "dl_state_dict*.bin": "the position in the data (dl_state_dict.bin, of Accelerate's loaders)",
    "custom_checkpoint_*.pkl": "what was registered for checkpointing (custom_checkpoint_*.pkl)",
    "model_1.safetensors": "models but the first",
    "optimizer_1*": "optimizers but the first",
    "scheduler_1.bin": "schedulers but the first",
}


def open_accelerate(folder: Path) -> Foreign:
    """Open a `save_state` folder.

    Raises:
        CheckpointError: A file cannot be read.
    """
    optimizer = None
    if (folder / "optimizer_0").is_dir():
        optimizer = open_optimizer(folder / "optimizer_0")
    elif (folder / "optimizer.bin").is_file():
        optimizer = ForeignOptimizer.from_state_dict(load_pickle(folder / "optimizer.bin"), folder / "optimizer.bin")
    scheduler, scaler = folder / "scheduler.bin", folder / "scaler.pt"
    not_taken = [text for pattern, text in _NOT_TAKEN.items() if next(folder.glob(pattern), None)]
    return Foreign(
        folder,
        "an `accelerator.save_state` folder",
        {"model": _weights(folder)},
        optimizer,
        load_pickle(scheduler) if scheduler.is_file() else None,
        load_pickle(scaler) if scaler.is_file() else None,
        num_processes=max(1, len(list(folder.glob("random_states_*.pkl")))),
        not_taken=(
            *not_taken,
            *([] if any("data" in text for text in not_taken) else ["the position in the data, which it has not"]),
        ),
    )


def _weights(folder: Path) -> TensorSource:
    if (folder / SHARDED).is_dir():
        return DcpFolder(folder / SHARDED).tensors("model")
    if (folder / FULL).is_file():
        return check_whole(load_pickle(folder / FULL), folder / FULL)
    source = find_weights(folder)
    if source is None:
        raise CheckpointError(f"{folder} is an `accelerator.save_state` folder without the weights")
    return source
