"""Tells the launcher why this process ends, and whether it must not be restarted.

`torchrun` (which `accelerate launch` uses) gives each process the path of a file for its error. In the summary that it
prints at the end, the failure with the earliest time is the first one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from .lost_contact import is_consequence

_LATER = 60
"""Seconds that are added to the time of a consequence. A killed rank writes no file, so the launcher uses the time when
it notices: at its monitor interval, which may be after the others have written."""
_parent = os.getppid()
_reported: list[BaseException] = []
_reason_to_end: list[str] = []


def report(exception: BaseException, place: str) -> None:
    """Write the reason why this process fails into the launcher's error file. Does nothing without such a launcher.

    Args:
        exception: The exception that ends the process. It counts as the first failure, unless it is a consequence of
            another rank's.
        place: The position of the run, for example "step 17".
    """
    _reported[:] = [exception]
    summary = detail = f"{type(exception).__name__}: {exception}"
    is_first = not is_consequence(exception)
    if isinstance(exception, SystemExit):
        summary = detail = "\n".join(getattr(exception, "__notes__", [f"exit code {exception.code}"]))
    elif is_first:
        detail = f"{summary}\n{''.join(traceback.format_exception(exception))}"
    write(summary, detail, place, is_first=is_first)


def write(summary: str, detail: str, place: str, *, is_first: bool) -> None:
    """Write the launcher's error file, in the form of torch's `record`.

    Args:
        summary: What has happened, in one line.
        detail: The same with all details, which the launcher prints.
        place: The position of the run.
        is_first: False: another rank failed first.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    place = f"Rank {os.environ.get('RANK', '0')}, {place}"
    timestamp = str(int(time.time()) + (0 if is_first else _LATER))
    extra = {"py_callstack": f"{place}: {detail}", "timestamp": timestamp}
    with suppress(OSError):  # the disk for the launcher's files may be full; its summary then has less information
        Path(file).write_text(json.dumps({"message": {"message": f"{place}: {summary}", "extraInfo": extra}}))


def retract() -> None:
    """Remove the report: the script has caught the exception and continues."""
    if _reported:
        _reported.clear()
        _reason_to_end.clear()
        with suppress(OSError):
            os.remove(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))


def end_restarts(reason: str) -> None:
    """When this process ends, also end the launcher if it would restart the run. Call on every rank.

    Args:
        reason: Why it must not restart, for the log: "SIGTERM was received".
    """
    _reason_to_end[:] = [reason]


def _num_restarts_left() -> int:
    num, limit = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(limit) - int(num) if num.isdigit() and limit.isdigit() else 0


def _launcher() -> Any:
    """The launcher's process. There may be processes in between, which also have the launcher's variables."""
    import psutil  # Accelerate brings it

    process: Any = psutil.Process().parent()
    while process is not None and "TORCHELASTIC_RUN_ID" in process.environ():
        process = process.parent()
    # If the launcher is gone, its place is taken by init, which is not Python.
    return process if process is not None and "python" in os.path.basename(process.exe()) else None


def _at_exit() -> None:
    exception = getattr(sys, "last_value", None)
    if exception is not None and all(reported not in (exception, exception.__cause__) for reported in _reported):
        report(exception, "outside of `train`")
    if _reason_to_end and _num_restarts_left() > 0 and os.getppid() == _parent:
        with suppress(Exception):  # no psutil, or no permission; then the launcher restarts the run
            launcher = _launcher()
            if launcher is not None:
                print(
                    f"{_reason_to_end[0]}: ending the launcher (process {launcher.pid}), which would start the run"
                    " again.",
                    file=sys.stderr,
                    flush=True,
                )
                launcher.send_signal(signal.SIGTERM)


atexit.register(_at_exit)
