"""examples/lora.py: adapters of peft on a frozen model in bf16, killed and started again, exported and merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.lora import LoraTrainer, parse
from trainloop.__main__ import main
from trainloop.checkpoint import Checkpoint
from trainloop.state.adapters import adapters_text

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .workers.lora import ARGUMENTS, KILLED_AT, STEPS

WARNING = "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # peft asks transformers for it
pytestmark = pytest.mark.filterwarnings(WARNING)
WORKER = REPOSITORY / "tests" / "workers" / "lora.py"
BLOCKS = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
BLOCKS += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]


def built() -> Any:
    """The model that the example builds with seed 0."""
    set_seed(0)
    return LoraTrainer.build_model(SimpleNamespace(options=parse(ARGUMENTS)))


def plain_losses(by_rank: list[dict[int, Any]]) -> list[list[float]]:
    """A loop by hand over the batches of all ranks; the losses by step and rank."""
    model = built()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    losses = []
    for step in range(1, STEPS + 1):
        losses.append([])
        for recorded in by_rank:
            batch = torch.tensor(recorded[step][1])
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            losses[-1].append(loss.item())
            (loss / len(by_rank)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module", params=["single", pytest.param("ddp2", marks=pytest.mark.slow), "fsdp2"])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """The workspace of a run that was killed and started again, and what each rank has recorded in both lives."""
    form, out = request.param, tmp_path_factory.mktemp(request.param)
    if form == "single":
        assert launch(WORKER, form, str(out), check=False).returncode != 0
        launch(WORKER, form, str(out))
    else:
        arguments = ["--max_restarts", "1", *(BLOCKS if form == "fsdp2" else [])]
        launch(WORKER, form, str(out), launch_args=arguments)
    paths = [out / f"{rank}.jsonl" for rank in range(NUM_PROCESSES[form])]
    return out, [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def test_each_loss_is_that_of_a_plain_loop(ended: tuple[Path, list[list[Any]]]) -> None:
    """In bf16, over a kill: in one process to the bit; several may add up in another order."""
    by_rank = ended[1]
    for rows in by_rank:
        steps = [step for step, _, _ in rows]
        assert steps[:KILLED_AT] == [1, 2, 3, 4, 5]
        assert steps[-2:] == [KILLED_AT, STEPS]  # it went on after step 4
    rel = 0.0 if len(by_rank) == 1 else 1e-4
    plain = plain_losses([{step: rest for step, *rest in rows} for rows in by_rank])
    for rank, rows in enumerate(by_rank):
        for step, loss, _ in rows:
            assert loss == pytest.approx(plain[step - 1][rank], rel=rel, abs=0), (rank, step)


def test_checkpoints_hold_the_adapters_only(ended: tuple[Path, list[list[Any]]]) -> None:
    """Weights and average: a tenth of the model."""
    manifest = Checkpoint.open(ended[0] / "checkpoints" / f"step_{STEPS:07d}").manifest
    for group in ("model", "ema"):
        assert len(manifest.tensors[group]) == 8
        assert all(".lora_" in name for name in manifest.tensors[group])
    assert all(".lora_" not in name for name in manifest.frozen)


def test_peft_reads_what_is_exported(ended: tuple[Path, list[list[Any]]], tmp_path: Path, capsys: Any) -> None:
    """The adapters under peft's names, in a model that computes what the run's computes; merged, too, if the base is
    that of the run.
    """
    checkpoints, adapter, merged = str(ended[0] / "checkpoints"), tmp_path / "adapter", tmp_path / "merged"
    assert main(["checkpoints", "export", checkpoints, "--format", "peft", "--output", str(adapter)]) == 0
    base = built().unload()
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(16)[None]

    whole = PeftModel.from_pretrained(base, adapter)
    checkpoint = Checkpoint.open(ended[0] / "checkpoints" / f"step_{STEPS:07d}")
    state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors("model").items()}
    checkpoint.read_into("model", state)
    assert {name for name, tensor in state.items() if not torch.equal(whole.state_dict()[name], tensor)} == set()
    assert len(load_file(adapter / "adapter_model.safetensors")) == len(state)
    wanted = whole(input_ids=ids).logits

    command = ["checkpoints", "export", checkpoints, "--format", "peft", "--merge", "--output", str(merged)]
    assert main(command) == 2  # no --base
    assert main([*command, "--base", str(tmp_path / "base")]) == 0
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(model(input_ids=ids).logits, wanted, rtol=0.05, atol=0.02)
    other = built().unload()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    assert main([*command, "--force", "--base", str(tmp_path / "other")]) == 1
    assert "The base model is not that of the run: base_model.model.lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_names_and_configuration_are_those_of_peft(tmp_path: Path, is_wrapped: bool) -> None:
    """As peft saves its own model. One that adapters were injected into gets the names that `from_pretrained` wants.
    A layer that is trained as a whole is part of the adapter; what is trained besides is told.
    """
    given = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    base = built().unload()
    whole = get_peft_model(copy.deepcopy(base), given)
    whole.save_pretrained(tmp_path)
    model: Any = whole if is_wrapped else inject_adapter_in_model(given, base)
    next(param for name, param in model.named_parameters() if name.endswith("model.norm.weight")).requires_grad_(True)
    text = adapters_text(model)
    assert text is not None
    described = json.loads(text)
    adapter = described["adapters"]["default"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    state = model.state_dict()
    assert {key: saved[key].shape for key in saved} == {k: state[name].shape for k, name in adapter["tensors"].items()}
    wanted = json.loads((tmp_path / "adapter_config.json").read_text())
    different = {key for key, value in wanted.items() if adapter["config"].get(key) != value}
    assert different <= {"target_modules", "modules_to_save"}, different  # sets, in any order
    assert [name.removeprefix("base_model.model.") for name in described["others"]] == ["model.norm.weight"]
    assert described["base"]["architectures"] == ["LlamaForCausalLM"]
