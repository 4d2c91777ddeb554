"""Tests for your own trainer: does it resume exactly, wherever it is killed?

In: a function that makes the trainer, and where to kill its run.
Out: nothing if the killed run finishes bit-for-bit identical to an uninterrupted one. Otherwise an error that shows the
first difference.
"""

from .kills import FILE_OPERATIONS, HOOK_EVENTS, KillAt
from .resume import assert_resume_exact

__all__ = ["FILE_OPERATIONS", "HOOK_EVENTS", "KillAt", "assert_resume_exact"]
