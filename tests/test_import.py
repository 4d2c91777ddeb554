"""What a newcomer meets first: `import trainloop`, the README's example, the map of the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import trainloop

REPOSITORY = Path(__file__).parents[1]
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


def test_the_map_names_every_file() -> None:
    """CONTRIBUTING.md has one line for each file of ours, and none for a file that is gone."""
    folders = ("trainloop", "tests", "examples", "benchmarks", "integrations")
    files = [
        path for folder in folders for suffix in ("py", "sh") for path in (REPOSITORY / folder).rglob(f"*.{suffix}")
    ]
    ours = {str(path.relative_to(REPOSITORY)) for path in files if path.stat().st_size}
    table = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## The map\n")[1]
    mapped = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(mapped) == sorted(ours)
