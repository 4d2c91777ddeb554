"""Where a life of a run may end."""

from __future__ import annotations

import signal
from dataclasses import dataclass

HOOK_EVENTS = (
    "on_before_train",
    "on_load_state_dict",
    "on_before_step",
    "on_non_finite_grad",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_log",
    "on_log_images",
    "on_after_step",
    "on_state_dict",
    "on_after_train",
)
"""Events of `BaseHook`. The trainer's own hooks have handled the event when the signal is sent."""
FILE_OPERATIONS = ("make_dir", "write", "sync_file", "sync_dir", "rename", "replace_symlink", "remove_tree")
"""What a save does to the disk (`trainloop.checkpoint.FileSystem`). The signal is sent before it is done."""
EVENTS = (*HOOK_EVENTS, "forward", *FILE_OPERATIONS, "disk")


@dataclass(frozen=True)
class KillAt:
    """Where a life of a run ends.

    Raises:
        ValueError: There is no such event, or a number is out of range.

    Example:
        >>> KillAt(5, "on_after_step")
        >>> KillAt(6, "rename")  # the first checkpoint from step 6 on is written, and does not have its name yet
        >>> KillAt(8, "forward", rank=1, signal=signal.SIGTERM)
    """

    step: int
    """Events are counted from the beginning of this optimizer step on; 0: from the start of the process."""
    event: str
    """One of `HOOK_EVENTS`, one of `FILE_OPERATIONS`, "forward" (a micro-batch is about to be computed) or "disk" (any
    file operation)."""
    rank: int = 0
    """Which process gets the signal."""
    number: int = 1
    """At which occurrence of the event, from 1."""
    signal: int = signal.SIGKILL
    """SIGKILL: the process is gone, and all others with it. Any other is only sent: the life ends as the trainer has
    it, for example saved by `CheckpointingHook(exit_signals=...)`."""

    def __post_init__(self) -> None:
        if self.event not in EVENTS:
            raise ValueError(f"`event` must be one of {', '.join(EVENTS)}, but is {self.event!r}.")
        for name, value, lowest in (("step", self.step, 0), ("rank", self.rank, 0), ("number", self.number, 1)):
            if value < lowest:
                raise ValueError(f"`{name}` must be at least {lowest}, but is {value}.")
