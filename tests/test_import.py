"""What a newcomer meets first: `import trainloop`, the README's example, the map of the files."""

from __future__ import annotations

import json
import subprocess
import sys

import trainloop

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


def test_the_readme_shows_the_example_as_it_is() -> None:
    """The README's first Python block is examples/digits.py, which the demo runs."""
    first_block = (REPOSITORY / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert first_block == (REPOSITORY / "examples" / "digits.py").read_text()


def test_the_map_is_what_the_files_say() -> None:
    """CONTRIBUTING.md has one line for each file of ours: the first sentence of its docstring."""
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert contributing.split(HEADING)[1].strip() == file_map().strip(), "run `python -m tests.file_map`"
