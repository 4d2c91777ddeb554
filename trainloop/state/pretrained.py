"""The files that `from_pretrained` needs beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable

from torch import nn

from ..checkpoint.format.layout import PEFT
from .adapters import adapters_text, config_of


def texts_beside(model: nn.Module, groups: Iterable[str], *, is_partial: bool = False) -> dict[str, str]:
    """The texts that a checkpoint has beside the weights of each group, by path.

    A model with peft's adapters has a `peft.json` and no `config.json`. If frozen parameters are left out,
    there is no `config.json` either: `from_pretrained` would fill in random values for the missing weights.

    Args:
        model: The model without its wrappers.
        groups: "model", and the groups of averages.
        is_partial: Whether frozen parameters are left out.
    """
    adapters = adapters_text(model)
    if adapters is not None:
        return {PEFT: adapters}
    config = None if is_partial else config_text(model)
    return {f"{group}/config.json": config for group in groups} if config is not None else {}


def config_text(model: nn.Module) -> str | None:
    """The `config.json` of a model of transformers, diffusers or another library, if the model or its `config` has
    `to_json_string`. None: it has none.
    """
    config = config_of(model)
    return None if config is None else json.dumps(config, indent=2) + "\n"
