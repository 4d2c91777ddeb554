"""What `from_pretrained` needs beside the weights."""

from __future__ import annotations

import json

from torch import nn


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
