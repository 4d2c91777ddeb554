"""What it costs to import a package: CPU time and modules, each time in a fresh process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

from .environment import environment
from .harness import REPOSITORY

IMPORTS = {
    "torch": "torch",
    "accelerate": "accelerate",
    "trainloop": "trainloop",
    "Lightning": "lightning",
    "transformers Trainer": "transformers.trainer",
    "pytorch-accelerated": "pytorch_accelerated.trainer",
    "Ignite": "ignite.engine",
}
_CODE = """
import importlib, json, sys, time
before = len(sys.modules)
start = time.process_time()
importlib.import_module({module!r})
print(json.dumps([time.process_time() - start, len(sys.modules) - before]))
"""


def imports(num_rounds: int) -> dict[str, list[tuple[float, int]]]:
    """CPU seconds and modules of each import, round by round; the first, which fills the disk's cache, is dropped.
    What is not installed is left out.
    """
    found = {name: module for name, module in IMPORTS.items() if importlib.util.find_spec(module.split(".")[0])}
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in found}
    env = environment()
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # or a checkout would be compiled each time, which an installed one isn't
    for _ in range(num_rounds + 1):
        for name, module in found.items():
            command = [sys.executable, "-W", "ignore", "-c", _CODE.format(module=module)]
            result = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=REPOSITORY)
            cpu, modules = json.loads(result.stdout.splitlines()[-1])
            measured[name].append((cpu, modules))
    return {name: values[1:] for name, values in measured.items()}
