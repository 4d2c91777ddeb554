"""The places at which a life of a run may end."""

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
    "on_log_histogram",
    "on_log_text",
    "on_after_step",
    "on_state_dict",
    "on_after_train",
)
"""Events of `BaseHook`. When the signal is sent, the trainer's own hooks have already handled the event."""
FILE_OPERATIONS = ("make_dir", "write", "sync_file", "sync_dir", "rename", "replace_symlink", "remove_tree")
"""The disk operations of a save (`trainloop.checkpoint.FileSystem`). The signal is sent before the operation."""
EVENTS = (*HOOK_EVENTS, "forward", *FILE_OPERATIONS, "disk")


@dataclass(frozen=True)
class KillAt:
    """The place at which a life of a run ends.

    Raises:
        ValueError: There is no such event, or a number is out of range.

    Example:
        ```python
        KillAt(5, "on_after_step")
        KillAt(6, "rename")  # the first checkpoint from step 6 on is written, but doesn't have its name yet
        KillAt(8, "forward", rank=1, signal=signal.SIGTERM)
        ```
    """

    step: int
    """Events count from the beginning of this optimizer step on. 0: from the start of the process."""
    event: str
    """One of `HOOK_EVENTS`, one of `FILE_OPERATIONS`, "forward" (a micro-batch is about to be computed) or "disk" (any
    file operation)."""
    rank: int = 0
    """The rank that gets the signal."""
    number: int = 1
    """The occurrence of the event at which the signal is sent, from 1."""
    signal: int = signal.SIGKILL
    """SIGKILL: the process ends at once, and then all others. With any other signal, the life ends as the trainer
    handles it, for example with a save by `CheckpointingHook(exit_signals=...)`."""

    def __post_init__(self) -> None:
        if self.event not in EVENTS:
            raise ValueError(f"`event` must be one of {', '.join(EVENTS)}, but is {self.event!r}.")
        for name, value, lowest in (("step", self.step, 0), ("rank", self.rank, 0), ("number", self.number, 1)):
            if value < lowest:
                raise ValueError(f"`{name}` must be at least {lowest}, but is {value}.")
