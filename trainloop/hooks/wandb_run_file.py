"""The file in the workspace that names the workspace's W&B run, and says whether that run has ended.

A checkpoint has the id too. The file is for a run that is killed before its first checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_FILE = "wandb-run.json"


def note_run(workspace: Path, run_id: str | None, config: Mapping[str, Any] | None) -> None:
    """Record which run is in progress. A `config` of None: it has ended."""
    file = workspace / RUN_FILE
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps({"run_id": run_id, "is_on": config is not None, "config": config}))
    beside.replace(file)


def find_killed_run(workspace: Path, config: Mapping[str, Any], logger: logging.Logger) -> str | None:
    """The id of the run that was killed in this workspace, if it had the same config; else None."""
    file = workspace / RUN_FILE
    if not file.exists():
        return None
    try:
        noted = json.loads(file.read_text())
        run_id: str | None = noted["run_id"] if noted["is_on"] and noted["config"] == config else None
    except (OSError, ValueError, KeyError, TypeError) as ex:
        logger.warning(f"{file} cannot be read, so a new W&B run starts: {type(ex).__name__}: {ex}")
        return None
    if run_id is not None:
        logger.info(f"{file} says that W&B run {run_id} was killed. It continues. Remove the file to start a new one.")
    return run_id
