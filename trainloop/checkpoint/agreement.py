"""Lets the ranks work together on something that can fail on any of them. No rank ever waits for one that has left.

Values on the host travel over gloo. A single process sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import CheckpointError
from ..ranks import collectives

T = TypeVar("T")
R = TypeVar("R")

_NUM_NAMED = 3  # ranks whose errors a message names


class Ranks:
    """The ranks of a run. They communicate over a separate group, or over the run's host group."""

    def __init__(self, timeout: timedelta | None = None) -> None:
        """Call on every rank if `timeout` is given.

        Args:
            timeout: Make a separate group with this timeout, so that a thread may use it. None: use the run's host
                group, which only the main thread may use.
        """
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self._own_group: Any = None
        if timeout is not None and self.world_size > 1:
            self._own_group = collectives.new_gloo_group(timeout)

    def do(self, work: Callable[[], T], decide: Callable[[list[T]], R], failure: str) -> R:
        """Every rank works, then rank 0 decides. Call on every rank.

        Args:
            work: Called on each rank.
            decide: Called on rank 0 with the results of `work`, by rank, if all ranks succeeded.
            failure: Start of the error message if something raised.

        Returns:
            The result of `decide`.

        Raises:
            CheckpointError: On every rank with the same message, if `work` raised on any rank, or `decide` on rank 0.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as ex:
            error = ex
        message, decision = None, None
        results = collectives.gather_on_first((None if error is None else _as_text(error), result), self._own_group)
        if results is not None:
            errors = {rank: text for rank, (text, _) in enumerate(results) if text is not None}
            if not errors:
                try:
                    decision = decide([value for _, value in results])
                except Exception as ex:
                    error, errors = ex, {0: _as_text(ex)}
            if errors:
                parts = [f"rank {rank}: {text}" for rank, text in list(errors.items())[:_NUM_NAMED]]
                more = len(errors) - _NUM_NAMED
                message = f"{failure}: {'; '.join(parts)}{f'; and {more} more ranks' if more > 0 else ''}."
        message, decision = collectives.broadcast_object((message, decision), self._own_group)
        if message is not None:
            raise CheckpointError(message) from error
        return decision  # type: ignore[return-value]

    def close(self) -> None:
        """Destroy the separate group. Call on every rank."""
        if self._own_group is not None and collectives.world_size() > 1:
            import torch.distributed as dist

            dist.destroy_process_group(self._own_group)
        self._own_group = None


def _as_text(error: Exception) -> str:
    """An error as a part of a sentence. Our own errors are shown without their type."""
    text = str(error).rstrip(".")
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
