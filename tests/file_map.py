"""The map of files in CONTRIBUTING.md, made from the docstrings: `python -m tests.file_map` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
HEADING = "## The map\n"
FOLDERS = {
    "trainloop": "The package: the trainer, its hooks' base class, and what everything else rests on.",
    "tests": "The tests, one file a promise or a part.",
    "tests/gpu": "Tests that run on a GPU, and on the CPU too where they can.",
    "tests/scripts": "Scripts as users write them, which tests migrate or run.",
    "tests/workers": "What tests start under `accelerate launch`.",
    "examples": "Complete programs. `make demo` runs the first one.",
    "examples/migration": "Scripts of other trainers, each before and after.",
    "benchmarks": "What trainloop costs beside others.",
    "benchmarks/gpu": "What trainloop costs on one GPU, part by part.",
    "benchmarks/systems": "The systems that the benchmarks compare.",
    "integrations": "Launch files and recipes for outside systems.",
}
"""The folders that say what they are here. Those inside `trainloop` say it in their `__init__.py`."""


def sentence(path: Path) -> str:
    """The first paragraph of a Python file's docstring, or a shell script's first comment."""
    if path.suffix == ".sh":
        return next(line for line in path.read_text().splitlines() if line.startswith("# ")).removeprefix("# ")
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path.relative_to(REPOSITORY)} has no docstring, so the map can't say what it is."
    return " ".join(docstring.split("\n\n")[0].split())


def file_map() -> str:
    """The section below HEADING: the folders, then the files of each."""
    files = sorted(
        path
        for folder in ("trainloop", "tests", "examples", "benchmarks", "integrations")
        for suffix in ("py", "sh")
        for path in (REPOSITORY / folder).rglob(f"*.{suffix}")
        if path.stat().st_size
    )
    groups: dict[str, list[Path]] = {folder: [] for folder in FOLDERS}
    for path in files:
        names = [str(parent) for parent in path.relative_to(REPOSITORY).parents]
        own = names[0] if (path.parent / "__init__.py").exists() and names[0].startswith("trainloop/") else None
        groups.setdefault(own or next(name for name in names if name in FOLDERS), []).append(path)
    about = {name: FOLDERS.get(name) or sentence(REPOSITORY / name / "__init__.py") for name in groups}
    order = sorted(groups, key=lambda name: (list(FOLDERS).index(name.split("/")[0]), name))
    parts = ["| folder | what it is |", "| --- | --- |", *(f"| `{name}/` | {about[name]} |" for name in order)]
    for name in order:
        parts += ["", f"### {name}/", "", "| file | what it is |", "| --- | --- |"]
        parts += [f"| `{path.relative_to(REPOSITORY)}` | {sentence(path)} |" for path in groups[name]]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    contributing = REPOSITORY / "CONTRIBUTING.md"
    contributing.write_text(contributing.read_text().split(HEADING)[0] + HEADING + "\n" + file_map())
