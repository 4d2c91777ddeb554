"""Several modules as one model, for a mapping that `build_model` returned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class Models(nn.ModuleDict):
    """The modules by name: `self.model["generator"](z)`. Each module is wrapped by itself; the mapping is not wrapped.

    Args:
        modules: The modules as `build_model` returned them, or as Accelerate prepared them.
        unwrapped: The same modules without wrappers. None: `modules` has none.
    """

    def __init__(self, modules: Mapping[str, nn.Module], unwrapped: Models | None = None) -> None:
        super().__init__(dict(modules))
        self._unwrapped = (unwrapped,)  # the tuple keeps it from becoming a submodule

    @property
    def unwrapped(self) -> Models:
        """The modules without their wrappers."""
        return self._unwrapped[0] or self


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules that Accelerate wraps, each by itself: the model, or the modules of a mapping."""
    return list(model.values()) if isinstance(model, Models) else [model]
