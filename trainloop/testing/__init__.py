"""What you test your own trainer with: killed anywhere, does it resume exactly?

In: a function that makes the trainer, and where to kill its run.
Out: nothing if the killed run ends bit-for-bit identical to an undisturbed one; else an error that shows the first
difference.
"""

from .kills import FILE_OPERATIONS, HOOK_EVENTS, KillAt
from .resume import assert_resume_exact

__all__ = ["FILE_OPERATIONS", "HOOK_EVENTS", "KillAt", "assert_resume_exact"]
