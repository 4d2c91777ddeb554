"""`peft`'s adapters in a model: their configurations, and the names under which peft saves their tensors.

A checkpoint stores this beside the weights, so that adapters can be exported without the model and without peft.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..step.non_finite import clean_name


def adapters_text(model: nn.Module) -> str | None:
    """A JSON text about the adapters of a model without wrappers. None: it has none. No communication.

    ```
    {"adapters": {"default": {"config": {...}, "tensors": {"base_model.model.….lora_A.weight": our name}}},
     "others": ["score.weight"],                         parameters that are trained besides the adapters
     "base": {"architectures": ["GPT2LMHeadModel"], …}}  the configuration of the base model, or null
    ```
    If peft fails, the text is `{"error": why}`: a save must not fail because of it.
    """
    found = _adapted(model)
    if found is None:
        return None
    try:
        return json.dumps(_describe(model, *found), indent=1, sort_keys=True) + "\n"
    except Exception as ex:  # peft's, of any kind
        return json.dumps({"error": f"{type(ex).__name__}: {ex}"}) + "\n"


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of a model of transformers, diffusers or another library, if the model or its `config` has
    `to_json_string`. None: it has none.
    """
    for source in (getattr(model, "config", None), model):
        write = getattr(source, "to_json_string", None)
        if callable(write):
            config: dict[str, Any] = json.loads(write())
            if source is not model:  # transformers adds the class name only when it saves
                config["architectures"] = config.get("architectures") or [type(model).__name__]
            return config
    return None


def base_model(model: nn.Module) -> nn.Module:
    """The model that adapters were added to, or the model itself if it is not peft's."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        base: nn.Module = model.get_base_model()
        return base
    return model


def _adapted(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The outermost module with adapters, and its name. None: there is none."""
    if "peft" not in sys.modules:
        return None
    for name, module in model.named_modules():
        if isinstance(getattr(module, "peft_config", None), Mapping) and module.peft_config:
            return name, module
    return None


def _describe(model: nn.Module, prefix: str, adapted: nn.Module) -> dict[str, Any]:
    state = adapted.state_dict()
    adapters = {name: _describe_adapter(adapted, name, prefix, state) for name in _configs(adapted)}
    held = {name for adapter in adapters.values() for name in adapter["tensors"].values()}
    trained = {clean_name(name) for name, param in model.named_parameters() if param.requires_grad}
    return {"adapters": adapters, "others": sorted(trained - held), "base": config_of(base_model(adapted))}


def _configs(adapted: nn.Module) -> Mapping[str, Any]:
    configs: Any = adapted.peft_config
    return dict(configs)


def _describe_adapter(adapted: nn.Module, name: str, prefix: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    import peft

    # peft would ask the hub whether the vocabulary was resized. Embeddings that are trained are saved anyway.
    saved = peft.get_peft_model_state_dict(adapted, state_dict=state, adapter_name=name, save_embedding_layers=False)
    names = {id(tensor): clean_name(f"{prefix}.{key}" if prefix else key) for key, tensor in state.items()}
    if made := [key for key, tensor in saved.items() if id(tensor) not in names]:
        raise ValueError(f"peft makes {made[0]} when it saves, which is none of the model's tensors")
    is_whole = isinstance(adapted, peft.PeftModel)  # False: `add_adapter` has added the adapter to the model itself
    tensors = {key if is_whole else f"base_model.model.{key}": names[id(tensor)] for key, tensor in saved.items()}
    return {"config": _config(adapted, name, is_whole), "tensors": tensors}


def _config(adapted: nn.Module, name: str, is_whole: bool) -> dict[str, Any]:
    """The configuration, in the form of `PeftModel.save_pretrained`."""
    given = _configs(adapted)[name]
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in given.to_dict().items()}
    base = base_model(adapted)
    config["inference_mode"] = True
    config["base_model_name_or_path"] = given.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if given.task_type is None and is_whole:
        config["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config
