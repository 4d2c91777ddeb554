"""A checkpoint's weights and averages are what `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from trainloop.state.pretrained import config_text

from .launching import REPOSITORY, launch

WORKER = REPOSITORY / "tests" / "workers" / "pretrained.py"


@pytest.mark.parametrize("form", ["single", "fsdp2"])
def test_from_pretrained_reads_model_and_average_of_a_checkpoint(tmp_path: Path, form: str) -> None:
    """A small GPT-2 with tied embeddings, in one file or in one a rank: the class is found by `config.json`, and every
    weight is the trained one.
    """
    wrap = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "GPT2Block"]
    launch(WORKER, form, str(tmp_path), launch_args=wrap if form == "fsdp2" else [])
    whole = torch.load(tmp_path / "whole.pt")
    for group in ("model", "ema"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step_0000003" / group)
        assert type(model) is GPT2LMHeadModel
        state = model.state_dict()
        assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
        assert {name for name in state if not torch.equal(state[name], whole[group][name])} == set()
    assert not torch.equal(whole["model"]["lm_head.weight"], whole["ema"]["lm_head.weight"])


def test_a_model_may_write_its_configuration_itself() -> None:
    """As those of diffusers do; a model without one has no `config.json`."""

    class OfDiffusers(nn.Module):
        config = {"sample_size": 8}  # noqa: RUF012  # theirs is a mapping too

        def to_json_string(self) -> str:
            return '{"sample_size": 8}'

    assert config_text(OfDiffusers()) == '{\n  "sample_size": 8\n}\n'
    assert config_text(nn.Linear(1, 1)) is None
