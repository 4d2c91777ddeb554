"""What this process tells the launcher that started it: why it ends, and that it should not be started again.

`torchrun`, and `accelerate launch` by way of it, gives each process the name of a file for its error. The summary that
it prints at the end takes the failure with the smallest time for the first one.
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
"""Seconds that a consequence is dated later: a rank that was killed writes no file, so the launcher dates it by when it
looks. That is at its monitor interval, and after the others may have written."""
_parent = os.getppid()
_reported: list[BaseException] = []
_reason_to_end: list[str] = []


def report(exception: BaseException, place: str) -> None:
    """Write why this process fails into the launcher's error file; nothing without such a launcher.

    Args:
        exception: What ends it. It counts as the first failure unless it is the consequence of another rank's.
        place: Where the run was, for example "step 17".
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
        summary: What has happened, in a line.
        detail: The same with all particulars, which the launcher prints.
        place: Where the run was.
        is_first: False: another rank failed first.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    place = f"Rank {os.environ.get('RANK', '0')}, {place}"
    timestamp = str(int(time.time()) + (0 if is_first else _LATER))
    extra = {"py_callstack": f"{place}: {detail}", "timestamp": timestamp}
    with suppress(OSError):  # the disk of the launcher's files is full: its summary says less
        Path(file).write_text(json.dumps({"message": {"message": f"{place}: {summary}", "extraInfo": extra}}))


def retract() -> None:
    """Take back what was reported: the script has caught the exception and goes on."""
    if _reported:
        _reported.clear()
        _reason_to_end.clear()
        with suppress(OSError):
            os.remove(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))


def end_restarts(reason: str) -> None:
    """When this process ends, end the launcher as well, if it would start the run again. Call on every rank.

    Args:
        reason: Why not, for the log: "SIGTERM was received".
    """
    _reason_to_end[:] = [reason]


def _num_restarts_left() -> int:
    num, limit = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(limit) - int(num) if num.isdigit() and limit.isdigit() else 0


def _launcher() -> Any:
    """The process of the launcher. There may be others in between, which have the launcher's variables as well."""
    import psutil  # Accelerate brings it

    process: Any = psutil.Process().parent()
    while process is not None and "TORCHELASTIC_RUN_ID" in process.environ():
        process = process.parent()
    # Where the launcher is gone, init has taken its place.
    return process if process is not None and "python" in os.path.basename(process.exe()) else None


def _at_exit() -> None:
    exception = getattr(sys, "last_value", None)
    if exception is not None and all(reported not in (exception, exception.__cause__) for reported in _reported):
        report(exception, "outside of `train`")
    if _reason_to_end and _num_restarts_left() > 0 and os.getppid() == _parent:
        with suppress(Exception):  # no psutil, or no right to look: the launcher then starts the run again
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
