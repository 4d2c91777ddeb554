"""Fetches the next batch and copies it to the device while the device still works on this step.

```
host     queue backward pass and update ─► fetch ─► read the norm ─► hooks ─► take ─► forward
device   ─────── backward pass ──────────── update ──────────────┘             │
copies                                          └─ host to device ─────────────┘
```

A batch counts as consumed only when it is taken, so a run can't observe any difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..records import map_nested

HOSTS = {"cpu"}
"""Types of devices that can't work while the host fetches, because they are the host."""


def looks_ahead(device: torch.device) -> bool:
    """Whether fetching ahead saves time: the device works in parallel to the host, and torch can copy to it then."""
    return device.type not in HOSTS and hasattr(getattr(torch, device.type, None), "Stream")


class LookAhead:
    """Fetches the next batch, and keeps it until it is taken.

    Args:
        device: The device for the batches. `looks_ahead` must be true for it.
        send: Moves a batch to the device. None: the batch is already there.
    """

    def __init__(self, device: torch.device, send: Callable[[Any], Any] | None) -> None:
        self._device, self._send = device, send or _as_it_is
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self.is_empty = True
        self._batch: Any = None
        self._is_sent = False
        self._event: Any = None
        """Occurs when the copy is complete."""
        self._error: Exception | None = None

    def fetch(self, next_batch: Callable[[], Any]) -> None:
        """Fetch a batch, and start to copy it to the device. `take` raises the errors of this."""
        self.is_empty = False
        try:
            self._batch = next_batch()
        except Exception as ex:
            self._error = ex
            return
        if not all(map(_is_on_host, _to_be_moved(self._batch))):
            return
        try:
            # On a separate stream, so that neither the copy nor the host waits for the work of the step.
            with self._module.stream(self._stream):
                self._batch, self._is_sent = self._send(self._batch), True
                self._event = self._stream.record_event()
        except Exception:  # for example if the device's memory is full now, but not after the step
            return

    def take(self, count: Callable[[], None]) -> Any:
        """Return the batch, on the device, for use on the current stream.

        Args:
            count: Called if fetching raised nothing, before anything else can fail.
        """
        batch, is_sent, event, error = self._batch, self._is_sent, self._event, self._error
        self.drop()
        if error is not None:
            raise error
        count()
        if not is_sent:
            return self._send(batch)
        stream = self._module.current_stream(self._device)
        stream.wait_event(event)
        for tensor in _to_be_moved(batch):
            if tensor.device.type != "cpu":
                tensor.record_stream(stream)  # otherwise the next copy could get its memory too early
        return batch

    def drop(self) -> None:
        """Forget the batch, so that it is fetched again."""
        self.is_empty = True
        self._batch, self._is_sent, self._event, self._error = None, False, None, None


def has_to(value: Any) -> bool:
    """Whether a part of a batch can be moved as a whole: it is a tensor, or has its own `to`."""
    return hasattr(value, "to")


def _to_be_moved(batch: Any) -> list[Any]:
    found: list[Any] = []

    def keep(value: Any) -> Any:
        found.append(value)
        return value

    map_nested(keep, batch, has_to)
    return found


def _is_on_host(value: Any) -> bool:
    """Whether it is a plain tensor on the host. Other objects might use the device in their own way."""
    return type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided


def _as_it_is(batch: Any) -> Any:
    return batch
