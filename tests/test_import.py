"""What a newcomer meets first: `import trainloop`, the README's example, the map of the files."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trainloop
from trainloop.version import find_version

from .file_map import HEADING, REPOSITORY, file_map

HEAVY = ["PIL", "tensorboard", "torch.distributed.checkpoint", "wandb"]


def test_importing_the_package_loads_nothing_that_only_some_need() -> None:
    """A fresh interpreter's `import trainloop` leaves every module of HEAVY unloaded, though each is installed."""
    code = """if True:
        import importlib.util, json, sys
        import trainloop
        heavy = json.loads(sys.argv[1])
        loaded = [name for name in heavy if name in sys.modules]
        print(json.dumps({"loaded": loaded, "missing": [n for n in heavy if not importlib.util.find_spec(n)]}))
    """
    command = [sys.executable, "-c", code, json.dumps(HEAVY)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    assert json.loads(output) == {"loaded": [], "missing": []}


def test_the_public_surface_is_sorted_and_there() -> None:
    """`__all__` lists each public name once, in order, and nothing that isn't there."""
    assert trainloop.__all__ == sorted(set(trainloop.__all__))
    assert [name for name in trainloop.__all__ if not hasattr(trainloop, name)] == []


def test_the_version_is_that_of_pyproject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout says its own version even if another one is installed; a copy that is in neither says "0+unknown"."""
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert trainloop.__version__ == version
    installed = tmp_path / "site-packages"
    metadata = installed / "trainloop_accelerate-7.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.4\nName: trainloop-accelerate\nVersion: 7.0\n")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.setattr(sys, "path", [])
    assert find_version(installed / "trainloop") == "0+unknown"
    monkeypatch.setattr(sys, "path", [str(installed)])
    assert find_version(installed / "trainloop") == "7.0"
    (checkout / "pyproject.toml").write_text('[project]\nname = "trainloop-accelerate"\nversion = "8.0"\n')
    assert find_version(checkout / "trainloop") == "8.0"
    (checkout / "pyproject.toml").write_text('[project]\nname = "theirs"\nversion = "8.0"\n')
    assert find_version(checkout / "trainloop") == "7.0", "the project that contains a copy of ours has its own version"


def test_the_readme_shows_the_example_as_it_is() -> None:
    """The README's first Python block is examples/digits.py, which the demo runs."""
    first_block = (REPOSITORY / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert first_block == (REPOSITORY / "examples" / "digits.py").read_text()


def test_the_map_is_what_the_files_say() -> None:
    """CONTRIBUTING.md has one line for each file of ours: the first sentence of its docstring."""
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert contributing.split(HEADING)[1].strip() == file_map().strip(), "run `python -m tests.file_map`"
