"""The random generators of a process (Python's, numpy's and torch's): seed them, save and restore their state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")


def derived_seed(*parts: Any) -> int:
    """A seed in [0, 2^32) that depends only on `parts`, in any process. torch, numpy and Python accept it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def seed_all(seed: int) -> None:
    """Seed the CPU generators of this process. Generators of other devices don't change."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed)


@contextmanager
def lent_rng(seed: int) -> Iterator[None]:
    """Seed the CPU generators inside this context, and restore them at its end."""
    before = rng_state(_CPU)
    seed_all(seed)
    try:
        yield
    finally:
        load_rng_state(before, _CPU)


class OwnRng:
    """Separate random generators on the CPU. Code inside `lent` draws from them instead of from those of the process,
    and each `lent` continues where the last one stopped. Each use costs 25 us, most of it for Python's generator.

    Args:
        seed: Seed of the generators.
        state: A state from `state` to continue from, instead of the seed.
    """

    def __init__(self, seed: int, state: dict[str, Any] | None = None) -> None:
        self._seed, self._begin = seed, state
        self._states: tuple[Any, Any, Any] | None = None

    def state(self) -> dict[str, Any]:
        """The state, in the form of `rng_state`."""
        with self.lent():
            return rng_state(_CPU)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside this context, the process draws from these generators."""
        before = _exchange(self._states)
        if self._states is None:
            if self._begin is None:
                seed_all(self._seed)
            else:
                load_rng_state(self._begin, _CPU)
        try:
            yield
        finally:
            self._states = _exchange(before)


def _exchange(states: tuple[Any, Any, Any] | None) -> tuple[Any, Any, Any]:
    """Put `states` in place of the states of the process, and return the latter. None: the caller sets them later."""
    numpy = _numpy()
    bits = None if numpy is None else numpy.random.get_bit_generator()
    before = random.getstate(), torch.get_rng_state(), bits
    if states is not None:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
    if numpy is not None:  # exchanging the generators is 100 times faster than exchanging their states
        numpy.random.set_bit_generator(numpy.random.MT19937(0) if states is None else states[2])
    return before


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of this process's random generators: Python, numpy, and torch on the CPU and on `device`."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
    }
    numpy = _numpy()
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)]
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def load_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a state that `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    numpy = _numpy()
    if numpy is not None and "numpy" in state:
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys.cpu().numpy().astype("uint32"), position, has_gauss, cached))
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


def _numpy() -> Any:
    """numpy, or None if it is not installed: torch and accelerate run without it."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy
