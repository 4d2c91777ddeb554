"""What users prove with that their own trainer, killed anywhere, resumes exactly."""

from .kills import FILE_OPERATIONS, HOOK_EVENTS, KillAt
from .resume import assert_resume_exact

__all__ = ["FILE_OPERATIONS", "HOOK_EVENTS", "KillAt", "assert_resume_exact"]
