"""The events file of a run: one JSON object a line, written as things happen.

```
{"event": "begin", "time": 1764149880.1, "life": 2, "hosts": {"n0": 8}, "processes": 8, "version": "0.1.0", …}
{"event": "start", "time": 1764149893.4, "life": 2, "step": 1000, "settings": {…}}
{"event": "save", "time": …, "life": 2, "step": 1200, "seconds": 0.8, "durable": false}
{"event": "durable", "time": …, "life": 2, "step": 1200, "seconds": 14.2}
{"event": "end", "time": …, "life": 2, "step": 1317, "reason": "signal", "detail": "SIGTERM"}
```

| event | when | fields |
| --- | --- | --- |
| begin | the run is built | hosts, processes, version, started (process start), pid, host, restart, versions, before |
| start | the run is restored | step (resumed from; 0: fresh), settings, max_steps |
| progress | about every 30 seconds | step, data_seconds (waits for data since the last event with this field) |
| evaluation | after a step with an evaluation | step, seconds |
| discarded | after a step that needed several windows | step, retries, overflows |
| save | the save has returned | step, seconds (blocked), durable, data_seconds |
| durable | an async save is known to have succeeded | step, seconds (from its start) |
| save_failed | a save has failed | step, detail |
| again | a life has repeated all steps of the earlier lives | step, data_seconds |
| audit | the repeated steps were compared | first, last, same, comparable; if they differ: step, rank, quantity |
| failed | an exception has left `train` | step, rank, error (its type), detail (its first line), lost_contact |
| end | rank 0 leaves `train` | step, reason, detail, data_seconds |

`restart` is the launcher's count of its restarts. `before` is the last record of the life before: time and step in its
ledger, which is written more often than this file. A life that was killed has no "end". The last line may be cut off.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
"""Name of the file in the workspace."""


class EventLog:
    """Appends to the events file. If the disk fails, the run continues, and the log says so once.

    Args:
        path: The file. Its folder is made. None: nothing is written.
        logger: For the warning when writing fails.
    """

    def __init__(self, path: Path | None, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self.path, self._logger = path, logger
        self.life = 0
        """Number of the life, from 1. Each event contains it."""

    def write(self, event: str, **fields: Any) -> None:
        """Append one complete line."""
        if self.path is None:
            return
        line = json.dumps(_plain({"event": event, "time": time.time(), "life": self.life, **fields}), allow_nan=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(file, f"{line}\n".encode())  # one call, so that lines of several processes don't mix
            finally:
                os.close(file)
        except OSError as ex:
            self._give_up(ex)

    def cut_torn_line(self) -> None:
        """Cut off the unfinished line of a killed process, so that the next line is separate."""
        if self.path is not None:
            try:
                cut_torn_line(self.path)
            except OSError as ex:
                self._give_up(ex)

    def _give_up(self, error: OSError) -> None:
        self._logger.warning(f"{self.path} cannot be written, so this run is not recorded: {error}")
        self.path = None


def cut_torn_line(path: Path) -> int:
    """Cut off the unfinished line of a killed process.

    Returns:
        The size of the file. 0: there is no file.
    """
    try:
        with path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end > 0:
                start = max(0, end - 2**16)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
            return end
    except FileNotFoundError:
        return 0


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file in the order in which they were written. Incomplete or damaged lines are skipped.

    Args:
        path: The file, or the workspace that has it. If the file doesn't exist, the result is empty.
    """
    path = path / EVENTS if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # from JSON or UTF-8
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and _is_number(event.get("time")):
            events.append(event)
    return events


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """A value that JSON can represent. Infinity, NaN and objects of other types become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if value is None or isinstance(value, str | int) else repr(value)
