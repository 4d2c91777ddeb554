"""Imports inside the package go one way, in the order of the folders and of the files in them. Modules are short."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

import trainloop

PACKAGE = Path(trainloop.__file__).parent
LAYERS = [
    "errors version terminal",
    "records rng paths",
    "images histograms",
    "ranks.__init__ ranks.forks ranks.sockets",
    "ranks.links ranks.tree",
    "ranks.collectives ranks.rendezvous",
    "ranks.lost_contact",
    "ranks.launcher ranks.roll_call",
    "ranks.control ranks.ctrl_c ranks.peers",
    "ranks.alike",
    "account.events account.ledger account.process",
    "account.audit account.lives",
    "account.difference account.goodput",
    "account.survey",
    "account.__init__",
    "ranks.samples",
    "ranks.failure",
    "checkpoint.format.__init__ checkpoint.format.limits checkpoint.format.dtypes checkpoint.format.boxes",
    "checkpoint.format.checks checkpoint.format.files checkpoint.format.nested",
    "checkpoint.format.rules",
    "checkpoint.format.tables",
    "checkpoint.format.layout",
    "checkpoint.format.integrity checkpoint.format.foreign",
    "checkpoint.format.tensorfile checkpoint.format.catalog",
    "checkpoint.format.verification",
    "checkpoint.placement",
    "checkpoint.content checkpoint.agreement checkpoint.clock checkpoint.retention",
    "checkpoint.sharding checkpoint.best",
    "checkpoint.fingerprint",
    "checkpoint.disk.__init__ checkpoint.disk.fs checkpoint.disk.lock",
    "checkpoint.disk.housekeeping",
    "checkpoint.save.__init__ checkpoint.save.plan",
    "checkpoint.save.planning",
    "checkpoint.save.snapshot",
    "checkpoint.save.writer",
    "checkpoint.save.replicas",
    "checkpoint.save.saving",
    "checkpoint.load.__init__ checkpoint.load.reader",
    "checkpoint.load.loading",
    "checkpoint.importing.content",
    "checkpoint.importing.dcp checkpoint.importing.hand_made checkpoint.importing.origin",
    "checkpoint.importing.weights",
    "checkpoint.importing.accelerate",
    "checkpoint.importing.__init__",
    "checkpoint.store",
    "checkpoint.newest",
    "checkpoint.__init__",
    "account.keeper account.step_lines",
    "account.metrics",
    "checkpoint.tools.__init__ checkpoint.tools.sources",
    "checkpoint.tools.export checkpoint.tools.survey",
    "checkpoint.tools.export_accelerate checkpoint.tools.export_peft checkpoint.tools.pick checkpoint.tools.prune",
    "checkpoint.tools.report",
    "data.per_rank data.checksums data.workers data.look_ahead",
    "data.order data.shares data.read_cost",
    "data.bad_samples data.tokens",
    "data.sampling data.stream_reading data.mixture",
    "data.token_files data.streamed",
    "data.__init__",
    "data.loaders",
    "data.indexed data.iterable data.first_batches",
    "data.sources",
    "data.feed",
    "step.__init__ step.garbage step.gradients step.loss_weights step.non_finite step.optimizers step.models",
    "step.gradient_checks step.modes step.retries",
    "step.frozen step.buffers_of_ddp",
    "step.buffers",
    "step.built",
    "step.info step.run_length",
    "step.window step.agreement",
    "hook",
    "logged",
    "step.update",
    "step.phases",
    "recipe",
    "setup.__init__ setup.deterministic setup.statistics",
    "setup.launch setup.report setup.subclasses setup.summary",
    "setup.accelerate_options setup.buckets setup.frozen_helpers",
    "setup.arguments setup.forward_methods",
    "setup.module_init",
    "setup.factories",
    "setup.initial_weights",
    "setup.preparing setup.trainable",
    "setup.building",
    "state.__init__ state.adapters state.live state.settings",
    "state.pretrained",
    "state.optimizer state.modules state.model_copy state.resuming",
    "state.frozen state.hook_state",
    "state.saved",
    "state.adoption state.training",
    "state.restoring state.weights",
    "evaluation.objects evaluation.guard evaluation.shares",
    "evaluation.totals evaluation.collected",
    "evaluation.batches evaluation.huggingface",
    "evaluation.__init__",
    "evaluation.prediction",
    "evaluation.methods",
    "rehearsal",
    "trainer",
    "ready_made",
    "hooks.__init__ hooks.ema hooks.out_of_memory hooks.tracker_forms hooks.tracking",
    "hooks.wandb_files hooks.wandb_run_file",
    "hooks.evaluation",
    "hooks.metrics hooks.deadline",
    "hooks.save_timing",
    "hooks",
    "testing.kills testing.comparison",
    "testing.witness",
    "testing.lives",
    "testing.resume testing.subject",
    "testing.proof",
    "testing.__init__",
    "__init__",
    "commands.__init__ commands.parser commands.pictures",
    "commands.curves commands.runs_plot",
    "commands",
    "__main__",
]
"""A module imports only from the lines above its own. "hooks" stands for all modules of that folder that no other line
names."""
MAX_LINES = 350
LONGER = {"trainer": 450}  # with the docstrings of all its public methods


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


def module_paths(package: Path) -> dict[str, Path]:
    """Each module ("hooks.stats") with its file."""
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}


def import_graph(package: Path) -> dict[str, set[str]]:
    """For each module the modules of ours that it imports while it runs: not what stands under TYPE_CHECKING."""
    paths = module_paths(package)
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
    return sorted(f"{a} -> {b}" for a, b in edges if layer(b) >= layer(a))


def test_imports_go_one_way() -> None:
    """No module imports from its own layer or a later one, so none import one another in a circle."""
    assert upward_imports(PACKAGE) == []


def test_every_name_in_the_layers_is_of_a_module() -> None:
    """LAYERS names no module twice, and none that is gone."""
    names = [name for names in LAYERS for name in names.split()]
    assert len(names) == len(set(names))
    modules = import_graph(PACKAGE).keys()
    assert [name for name in names if name not in modules and f"{name}.__init__" not in modules] == []


def test_modules_are_short() -> None:
    """No module is longer than `MAX_LINES`, but those in LONGER."""
    lines = {module: len(path.read_text().splitlines()) for module, path in module_paths(PACKAGE).items()}
    assert {module: n for module, n in lines.items() if n > LONGER.get(module, MAX_LINES)} == {}


def test_hooks_name_the_trainer_for_types_only() -> None:
    """A hook needs nothing of the trainer but the instance that it is handed."""
    hooks = {module: imports for module, imports in import_graph(PACKAGE).items() if module.startswith("hooks.")}
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
        (
            "checkpoint/save/snapshot",
            "from .saving import Saver",
            ["checkpoint.save.snapshot -> checkpoint.save.saving"],
        ),
        ("hooks/stats", "from .throughput import ThroughputHook", ["hooks.stats -> hooks.throughput"]),
        ("hooks/stats", "from .ema import EmaHook", []),
        ("hook", "if TYPE_CHECKING:\n    from .trainer import Trainer", []),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, module: str, line: str, expected: list[str]) -> None:
    """The check sees an import upward wherever it stands, and lets one for types pass."""
    package = shutil.copytree(PACKAGE, tmp_path / "trainloop")
    path = package / f"{module}.py"
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert upward_imports(package) == expected
