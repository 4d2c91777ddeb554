"""The version of this trainloop, as `trainloop.__version__` and in manifests."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

DISTRIBUTION = "trainloop-accelerate"


def find_version(package: Path) -> str:
    """The version of the package in the folder `package`.

    A checkout has its version in the `pyproject.toml` beside the package. That file comes first, because a checkout on
    `PYTHONPATH` can hide an installed trainloop of another version, and because the metadata of an editable install is
    not updated with the file.

    Returns:
        The version; "0+unknown" for a copy of the package that is neither in a checkout nor installed.
    """
    pyproject = package.parent / "pyproject.toml"
    if pyproject.is_file():
        import tomllib  # only a checkout needs it

        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:  # a project that contains a copy of ours has its own file there
            return str(project["version"])
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = find_version(Path(__file__).parent)
