"""Imports go one way, and what only one hook needs is not loaded with the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import trainloop

PACKAGE = Path(trainloop.__file__).parent
LAYERS = [
    {"errors"},
    {"records", "rng", "distributed"},
    {"weights", "sampling", "non_finite", "gradients", "control", "launch"},
    {"step", "data", "state", "hook"},
    {"build"},
    {"trainer"},
    {"hooks"},
    {"__init__"},
]
"""A module imports from the layers above its own line only, or from its own layer's neighbours where no circle arises."""
HEAVY = {"wandb", "PIL", "tensorboard", "torch.distributed.checkpoint"}


def layer(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if module.split(".")[0] in names]
    assert found, f"trainloop/{module} has no place in LAYERS: give it one"
    return found[0]


def imports(path: Path) -> list[str]:
    """Modules of ours that `path` imports while it runs; what stands under TYPE_CHECKING doesn't count."""
    tree = ast.parse(path.read_text())
    depth = len(path.relative_to(PACKAGE).parts)
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in only_types:
            assert node.level <= depth, f"{path} imports from outside the package"
            if node.level < depth:  # a neighbour in its own folder
                continue
            modules += [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
    return modules


def test_imports_go_one_way() -> None:
    """No module imports from a later layer: hooks know the trainer, and the trainer knows no hook, by name only."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        wrong += [f"{own} -> {name}" for name in imports(path) if layer(name) > layer(own)]
    assert wrong == []


def test_trainer_and_hooks_name_each_other_for_types_only() -> None:
    """A hook imports no trainer while it runs, and the trainer no hook but the base classes."""
    wrong = [path.name for path in (PACKAGE / "hooks").rglob("*.py") if "trainer" in imports(path)]
    assert wrong == []
    assert "hooks" not in imports(PACKAGE / "trainer.py")


def test_importing_the_package_loads_nothing_that_only_some_need() -> None:
    """`import trainloop` stays as cheap as `import accelerate` is."""
    code = f"import sys, trainloop; print(sorted({HEAVY!r} & sys.modules.keys()))"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert output.stdout.strip() == "[]"


def test_the_public_surface_is_sorted_and_there() -> None:
    """`__all__` lists what there is, in order."""
    assert trainloop.__all__ == sorted(trainloop.__all__)
    assert [name for name in trainloop.__all__ if not hasattr(trainloop, name)] == []
