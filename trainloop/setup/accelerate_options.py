"""Options of Accelerate. Each one is either honoured or refused; none is silently ignored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from torch import nn

from ..errors import describe


def check_kwargs_handlers(handlers: Sequence[Any], *, has_accelerator: bool, has_timeout: bool) -> None:
    """Raise for `kwargs_handlers` that have a wrong type, or that another argument makes ineffective."""
    for handler in handlers:
        if not isinstance(handler, KwargsHandler):
            raise TypeError(
                "`kwargs_handlers` must be a list of Accelerate's kwargs handlers, for example"
                f" `accelerate.DistributedDataParallelKwargs()`, but one is {describe(handler)}."
            )
        if has_timeout and isinstance(handler, InitProcessGroupKwargs):
            raise ValueError(
                "`timeout` and the `InitProcessGroupKwargs` in `kwargs_handlers` both set the timeout. Give only one."
            )
    if handlers and has_accelerator:
        raise ValueError(
            "`kwargs_handlers` has no effect on a given `accelerator`. Pass them to the `Accelerator` instead."
        )


def check_data_loader_options(loader: Any, seed: int, accelerator: Accelerator) -> None:
    """Raise if the accelerator's `DataLoaderConfiguration` asks for something that the trainer does in another way.

    `even_batches` and `use_seedable_sampler` hold with any value: all ranks have equally many samples without
    repetition, and the order is a function of the seed. `non_blocking` is honoured. A loader that the script has
    prepared follows the configuration itself.
    """
    if isinstance(loader, DataLoaderShard | DataLoaderDispatcher):
        return
    config = accelerator.dataloader_config
    remedies = {
        "split_batches": (
            "the loader's `batch_size` is that of one process here. Divide it by the number of processes, and leave out"
            " `split_batches`"
        ),
        "dispatch_batches": "each rank reads its own batches here. Leave it out",
        "use_stateful_dataloader": (
            "the position in the data is saved without it. Leave it out, or return a `torchdata` StatefulDataLoader"
        ),
    }
    for name, remedy in remedies.items():
        if getattr(config, name, None):
            raise ValueError(f"The `Accelerator` was built with `DataLoaderConfiguration({name}=True)`, but {remedy}.")
    if config.data_seed is not None and config.data_seed != seed:
        raise ValueError(
            f"The `Accelerator` was built with `DataLoaderConfiguration(data_seed={config.data_seed})`, but the order"
            f" of the data follows the trainer's `seed`, which is {seed}. Pass it as `seed`."
        )


def restore_noise_in_checkpointed_layers(model: nn.Module) -> None:
    """Make layers under activation checkpointing draw the same dropout mask again in the backward pass.

    Accelerate's `fsdp2_apply_ac` passes `preserve_rng_state=False`. The gradients would then belong to another mask,
    and nothing would show it.
    """
    for module in model.modules():
        run: Any = getattr(module, "checkpoint_fn", None)
        if isinstance(run, functools.partial) and run.keywords.get("preserve_rng_state") is False:
            run.keywords["preserve_rng_state"] = True
