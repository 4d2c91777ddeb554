"""Several modules as one model: what `build_model` returned as a mapping."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class Models(nn.ModuleDict):
    """The modules by name: `self.model["generator"](z)`. Each is wrapped by itself, the mapping is not.

    Args:
        modules: As `build_model` returned them, or as Accelerate prepared them.
        unwrapped: With the same modules without their wrappers. None: these are.
    """

    def __init__(self, modules: Mapping[str, nn.Module], unwrapped: Models | None = None) -> None:
        super().__init__(dict(modules))
        self._unwrapped = (unwrapped,)  # in a tuple, so that it is no part of this module

    @property
    def unwrapped(self) -> Models:
        """The modules without their wrappers."""
        return self._unwrapped[0] or self


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules that Accelerate wraps, each by itself: the model, or those of a mapping."""
    return list(model.values()) if isinstance(model, Models) else [model]
