"""Python's garbage collection in step: in a distributed run all ranks collect after the same steps.

A collection stops its process, and a rank that stops makes all others wait. Left to Python, each rank collects at its
own time, so the run waits for each of them in turn.
"""

from __future__ import annotations

import gc
from types import TracebackType

from ..ranks import collectives

_FROZEN_BY_PYTHON = 1000
"""More objects than Python freezes by itself at its start (3.12: 375), and far fewer than torch alone makes."""


class GarbageCollection:
    """Within it, what exists at its beginning is never looked at again by a collection (a full one over all imported
    modules takes about 100 ms), and the ranks of a distributed run collect in step. At its end Python's own settings
    are put back, also after an exception.

    Args:
        interval: Steps from one collection to the next. None: everything is left to Python.
    """

    def __init__(self, interval: int | None) -> None:
        self._interval = interval
        self._in_step = interval is not None and collectives.world_size() > 1
        self._was_enabled = self._freezes = False

    def __enter__(self) -> GarbageCollection:
        if self._interval is not None:
            self._was_enabled = gc.isenabled()
            # If the script has frozen anything itself, `unfreeze` would thaw that as well.
            self._freezes = gc.get_freeze_count() < _FROZEN_BY_PYTHON
            if self._freezes:
                gc.collect(1)  # garbage of the build would stay till the end
                gc.freeze()
            if self._in_step:
                gc.disable()
        return self

    def __exit__(self, kind: type[BaseException] | None, ex: BaseException | None, trace: TracebackType | None) -> None:
        if self._in_step and self._was_enabled:
            gc.enable()
        if self._freezes:
            gc.unfreeze()

    def collect_if_due(self, step: int) -> None:
        """Collect, if it is time to. Call on every rank, after each step."""
        if self._in_step and self._interval is not None and step % self._interval == 0:
            gc.collect()
