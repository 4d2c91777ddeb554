"""What `from_pretrained` needs beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable

from torch import nn


def texts_beside(model: nn.Module, groups: Iterable[str]) -> dict[str, str]:
    """What a checkpoint has beside the weights of each group, by path.

    Args:
        model: The model without its wrappers.
        groups: "model", and those of averages.
    """
    config = config_text(model)
    return {f"{group}/config.json": config for group in groups} if config is not None else {}


def config_text(model: nn.Module) -> str | None:
    """The `config.json` of a model of transformers, diffusers, or anything else that has a `config` with
    `to_json_string`, or has that itself; None: it has none.
    """
    for source in (getattr(model, "config", None), model):
        write = getattr(source, "to_json_string", None)
        if callable(write):
            config = json.loads(write())
            if source is not model:  # transformers names the class only when it saves
                config["architectures"] = config.get("architectures") or [type(model).__name__]
            return json.dumps(config, indent=2) + "\n"
    return None
