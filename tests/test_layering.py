"""Imports inside the package go one way, and no modules import one another in a circle."""

from __future__ import annotations

import ast
import shutil
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trainloop

PACKAGE = Path(trainloop.__file__).parent
LAYERS = [
    "errors version",
    "records rng images",
    "ranks.__init__ ranks.collectives",
    "ranks.control ranks.peers",
    "ranks.failure",
    "checkpoint.format.__init__ checkpoint.format.nested",
    "checkpoint.format.layout",
    "checkpoint.format.integrity checkpoint.format.foreign",
    "checkpoint.format.tensorfile checkpoint.format.catalog",
    "checkpoint.content checkpoint.agreement checkpoint.retention",
    "checkpoint.sharding",
    "checkpoint.disk",
    "checkpoint.save checkpoint.load checkpoint.importing",
    "checkpoint.store",
    "checkpoint.__init__",
    "checkpoint.tools",
    "data.__init__ data.sampling",
    "data.loaders",
    "data.indexed data.iterable",
    "data.sources",
    "data.feed",
    "step.__init__ step.gradients step.loss_weights step.non_finite",
    "step.info",
    "step.window step.agreement",
    "hook",
    "setup.__init__ setup.launch setup.report",
    "setup.factories",
    "state.__init__ state.live state.pretrained",
    "state.saved state.adoption state.training",
    "evaluation.totals evaluation.batches",
    "evaluation.__init__",
    "recipe",
    "trainer",
    "ready_made",
    "hooks testing",
    "__init__",
    "__main__",
]
"""A module or folder imports from its own line and those above it. A folder stands for all modules in it that no other
line names."""


def layer(module: str) -> int:
    """The line of LAYERS that `module` ("hooks.stats") belongs to: the one with the longest name that fits."""
    fits = [
        (len(name), i)
        for i, names in enumerate(LAYERS)
        for name in names.split()
        if module == name or module.startswith(f"{name}.")
    ]
    assert fits, f"trainloop/{module.replace('.', '/')}.py has no place in LAYERS: give it one"
    return max(fits)[1]


def import_graph(package: Path) -> dict[str, set[str]]:
    """For each module the modules of ours that it imports while it runs: not what stands under TYPE_CHECKING."""
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        tree = ast.parse(path.read_text())
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        only_types = {
            id(inner)
            for block in blocks
            if ast.unparse(block.test) == "TYPE_CHECKING"
            for statement in block.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == package.name for alias in node.names), (
                    f"{path}: use `from .`"
                )
            elif isinstance(node, ast.ImportFrom) and id(node) not in only_types:
                assert (node.module or "").split(".")[0] != package.name or node.level, f"{path}: use `from .`"
                if node.level:
                    graph[module] |= {find(module, node, alias.name, paths) for alias in node.names}
    return graph


def find(module: str, node: ast.ImportFrom, name: str, paths: dict[str, Path]) -> str:
    """The module that a relative import of `name` in `module` loads."""
    base = [*module.split(".")[: -node.level], *(node.module.split(".") if node.module else [])]
    candidates = [".".join(parts) for parts in ([*base, name], base, [*base, "__init__"])]
    return next(candidate for candidate in candidates if candidate in paths)


def upward_imports(package: Path) -> list[str]:
    """Imports that break the layers, as "importer -> imported"."""
    edges = [(module, imported) for module, imports in import_graph(package).items() for imported in imports]
    return sorted(f"{a} -> {b}" for a, b in edges if layer(b) > layer(a))


def test_imports_go_one_way() -> None:
    """No module imports from a later layer."""
    assert upward_imports(PACKAGE) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Modules of one layer, and of one folder, can be read one after the other."""
    TopologicalSorter(import_graph(PACKAGE)).prepare()  # raises CycleError, which names the circle


def test_hooks_name_the_trainer_for_types_only() -> None:
    """A hook needs nothing of the trainer but the instance that it is handed."""
    hooks = {module: imports for module, imports in import_graph(PACKAGE).items() if layer(module) == layer("hooks")}
    assert hooks
    assert [module for module, imports in hooks.items() if "trainer" in imports] == []


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("records", "from .trainer import BaseTrainer", ["records -> trainer"]),
        ("hooks/stats", "from .. import BaseTrainer", ["hooks.stats -> __init__"]),
        (
            "checkpoint/format/layout",
            "def late():\n    from ...data.feed import DataFeed",
            ["checkpoint.format.layout -> data.feed"],
        ),
        (
            "checkpoint/format/nested",
            "from .catalog import Catalog",
            ["checkpoint.format.nested -> checkpoint.format.catalog"],
        ),
        ("step/gradients", "from .info import StepInfo", ["step.gradients -> step.info"]),
        ("hook", "if TYPE_CHECKING:\n    from .trainer import Trainer", []),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, module: str, line: str, expected: list[str]) -> None:
    """The check sees an import upward wherever it stands, and lets one for types pass."""
    package = shutil.copytree(PACKAGE, tmp_path / "trainloop")
    path = package / f"{module}.py"
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert upward_imports(package) == expected
