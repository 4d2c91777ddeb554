"""Python's garbage collection, synchronized: in a distributed run all ranks collect after the same steps.

A collection pauses its process, and a rank that pauses makes all others wait. If Python decides, each rank collects at
another time, so the run waits for each of them in turn.
"""

from __future__ import annotations

import gc
from types import TracebackType

from ..ranks import collectives

_FROZEN_BY_PYTHON = 1000
"""More objects than Python freezes itself at its start (3.12: 375), and far fewer than torch alone creates."""


class GarbageCollection:
    """Makes garbage collections cheap and synchronized inside this context.

    Objects that exist when it begins are not examined again (a full collection over all imported modules takes about
    100 ms). The ranks of a distributed run collect after the same steps. At the end, and after an exception, Python's
    own settings are restored.

    Args:
        interval: Steps from one collection to the next. None: Python decides.
    """

    def __init__(self, interval: int | None) -> None:
        self._interval = interval
        self._in_step = interval is not None and collectives.world_size() > 1
        self._was_enabled = self._freezes = False

    def __enter__(self) -> GarbageCollection:
        if self._interval is not None:
            self._was_enabled = gc.isenabled()
            # If the script has frozen objects itself, `unfreeze` would release them too.
            self._freezes = gc.get_freeze_count() < _FROZEN_BY_PYTHON
            if self._freezes:
                gc.collect(1)  # otherwise garbage of the build would stay until the end
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
        """Collect if a collection is due. Call on every rank, after each step."""
        if self._in_step and self._interval is not None and step % self._interval == 0:
            gc.collect()
