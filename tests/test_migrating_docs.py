"""docs/migrating.md says what is: its code runs, its scripts and counts are the files', and what it names exists."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainloop
import trainloop.checkpoint
from trainloop import BaseHook, BaseTrainer

from .launching import REPOSITORY, environment

TEXT = (REPOSITORY / "docs" / "migrating.md").read_text()
EXAMPLES = REPOSITORY / "examples" / "migration"
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SCRIPTS = {path.read_text(): path for path in EXAMPLES.glob("*/*.py")}
SNIPPETS = [block for block in BLOCKS if block not in SCRIPTS]
NOT_OURS = {
    "DataLoader",
    "accelerate",
    "batch",
    "batch_size",
    "checkpoints",
    "collate_fn",
    "export",
    "from_pretrained",
    "get_scheduler",
    "launch",
    "m",
    "python",
    "self",
    "step_0001000",
    "trainer",
}
"""Names in the columns "here" that are not of this package."""


def snippet(text: str) -> str:
    """The one that holds this text."""
    (found,) = [block for block in SNIPPETS if text in block]
    return found


def test_every_block_is_a_script_of_ours_or_one_of_the_snippets() -> None:
    """The ten scripts stand in the text as they are; all else compiles."""
    shown = {str(SCRIPTS[block].relative_to(EXAMPLES)) for block in BLOCKS if block in SCRIPTS}
    tools = ["checkpointing", "from_lightning", "from_transformers", "from_pytorch_accelerated", "from_origin"]
    assert shown == {f"{tool}/{which}.py" for tool in tools for which in ("before", "after")}
    assert len(SNIPPETS) == 5
    for block in BLOCKS:
        compile(block, "migrating.md", "exec")


def counter() -> Any:
    """The module `count.py`."""
    spec = importlib.util.spec_from_file_location("count", EXAMPLES / "count.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_counts_are_those_of_the_scripts() -> None:
    """What `count.py` prints now."""
    assert counter().table() in TEXT


def test_the_counter_counts_code_only(tmp_path: Path) -> None:
    """No blank line, comment or docstring; each line of a statement that has several."""
    path = tmp_path / "script.py"
    path.write_text(
        '"""Doc."""\n\nx = """a\nb"""  # c\n# d\n\n\ndef f():\n    """Doc."""\n    return (\n        1\n    )\n'
    )
    assert counter().code_lines(path) == ['x = """a', 'b"""  # c', "def f():", "return (", "1", ")"]


def test_the_smallest_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block, with objects that a script has, trains its 200 steps and saves."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "loader": DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 1)), batch_size=2),
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }
    code = snippet("accelerator.prepare(model, optimizer, loader, scheduler)")
    exec(code.replace("Accelerator()", "Accelerator(cpu=True)"), script)
    assert sorted(path.name for path in Path("runs/mine/checkpoints").glob("step_*")) == ["step_0000200"]


def test_the_old_learning_rate_can_be_had() -> None:
    """`SteppedByEachProcess` gives what a scheduler that Accelerate has wrapped gives at four processes."""
    names: dict[str, Any] = {"torch": torch}
    exec(snippet("class SteppedByEachProcess"), names)

    def function(step: int) -> float:
        return 1 / (1 + step)

    traces = []
    for num_processes in (1, 4):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        if num_processes == 4:
            scheduler = names["SteppedByEachProcess"](optimizer, function, 4)
        else:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, function)
        rates = []
        for _ in range(5):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for _ in range(4 // num_processes):  # what accelerate.scheduler does
                scheduler.step()
        traces.append(rates)
    assert traces[0] == traces[1]


def test_a_policy_of_the_users_own_is_left_alone() -> None:
    """The block's policy is the one that FSDP2 gets, with bf16 reduction."""
    check = """
from trainloop.setup.launch import choose_fsdp2_precision
accelerator.state.fsdp_plugin = plugin  # on a CPU Accelerate forgets it
assert choose_fsdp2_precision(accelerator) is False
assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16
"""
    code = "import torch\n" + snippet("MixedPrecisionPolicy(").replace(
        "Accelerator(mixed", "Accelerator(cpu=True, mixed"
    )
    done = subprocess.run([sys.executable, "-c", code + check], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_ppo_learns_and_resumes_exactly(tmp_path: Path) -> None:
    """The block, on a bandit whose second arm is the better one: the policy comes to prefer it. Cut in the middle of a
    rollout and resumed, the run has the same weights, bit for bit.
    """

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits, self.value = nn.Linear(1, 2), nn.Linear(1, 1)

        def forward(self, observations: torch.Tensor) -> Any:
            return self.logits(observations), self.value(observations)[:, 0]

    def play(model: nn.Module, num_steps: int) -> dict[str, torch.Tensor]:
        observations = torch.ones(num_steps, 1)
        logits, values = model(observations)
        actions = torch.distributions.Categorical(logits=logits).sample()
        log_probs = logits.log_softmax(1).gather(1, actions[:, None])[:, 0]
        returns = actions.float()
        steps = {"observations": observations, "actions": actions, "log_probs": log_probs, "returns": returns}
        return {**steps, "advantages": returns - values}

    names: dict[str, Any] = {"torch": torch, "BaseTrainer": BaseTrainer, "Policy": Policy, "play": play}
    exec(snippet("class Rollouts"), names)

    class Saved(names["PpoTrainer"]):  # type: ignore[misc]
        def build_optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameters(), lr=0.05)

        def build_hooks(self) -> list[BaseHook]:
            return [trainloop.CheckpointingHook(100)]

    ends = []
    for name, lives in (("whole", (60,)), ("cut", (21, 38, 60))):
        for max_steps in lives:
            trainer = Saved(max_steps=max_steps, seed=0, device="cpu", workspace=tmp_path / name)
            trainer.train()
        ends.append([param.tolist() for param in trainer.model.parameters()])
    assert ends[0] == ends[1]
    probabilities = trainer.model(torch.ones(1, 1))[0].softmax(1)[0]
    assert probabilities[1] > 0.7


def test_the_import_is_named_for_the_first_start_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block names the old checkpoint until the run has one of its own."""
    monkeypatch.chdir(tmp_path)
    for load in (tmp_path / "old" / "checkpoint", "latest"):
        names: dict[str, Any] = {}
        exec(snippet("has_own"), names)
        assert names["hook"].load == load
        Path("runs/mine/checkpoints/step_0000100").mkdir(parents=True, exist_ok=True)


def test_what_is_named_exists() -> None:
    """Each name in a column "here" is a class, method, event or argument of this package."""
    classes = [getattr(trainloop, name) for name in trainloop.__all__ if inspect.isclass(getattr(trainloop, name))]
    known = {*trainloop.__all__, *trainloop.checkpoint.__all__, *dir(BaseTrainer), *dir(BaseHook), "trainloop"}
    trainer = {*BaseTrainer.__annotations__, *dir(trainloop.StepInfo)}
    built = [cls for cls in classes if not issubclass(cls, BaseException)]
    arguments = {name for cls in built for name in inspect.signature(cls).parameters}
    named = set()
    for row in re.findall(r"^\| .* \| (.*) \|$", TEXT.split("## What changes")[0], re.M):
        for code in re.findall(r"`([^`]*)`", row):
            named |= set(re.findall(r"(?<!\w)[A-Za-z_]\w*", re.sub(r'"[^"]*"', "", code)))
    assert len(named) > 40
    assert sorted(named - known - trainer - arguments - NOT_OURS) == []
