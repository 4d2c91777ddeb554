"""Several optimizers of one model, and their schedules, by name.

They step together: one window, one norm, one decision. So the rest of the package sees one optimizer with all
parameters and one schedule. It looks at the single optimizers only where it has to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer


class Optimizers(Optimizer):
    """One optimizer of all parameters, made from the mapping that `build_optimizer` returned.

    Args:
        by_name: The raw optimizers. They must not share parameters.
    """

    def __init__(self, by_name: Mapping[str, Optimizer]) -> None:
        # Not `super().__init__`, which would create its own parameter groups.
        self.by_name = dict(by_name)
        self.defaults: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Optimizer:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers: the same objects, not copies."""
        return [group for optimizer in self.by_name.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The state of all optimizers by parameter, in a new dict."""
        return {key: value for optimizer in self.by_name.values() for key, value in optimizer.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every optimizer."""
        for optimizer in self.by_name.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of each optimizer, by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, optimizer in self.by_name.items():
            optimizer.load_state_dict(state_dict[name])


class LRSchedulers:
    """The schedulers of the mapping that `build_lr_scheduler` returned, by the names of the optimizers.

    Args:
        by_name: The raw schedulers.
    """

    def __init__(self, by_name: Mapping[str, Any]) -> None:
        self.by_name = dict(by_name)

    def __getitem__(self, name: str) -> Any:
        return self.by_name[name]

    def step(self) -> None:
        """Move every schedule by one step."""
        for scheduler in self.by_name.values():
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The state dict of each scheduler, by name."""
        return {name: scheduler.state_dict() for name, scheduler in self.by_name.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: The state belongs to other schedules.
        """
        if state_dict.keys() != self.by_name.keys():
            raise ValueError(
                f"`build_lr_scheduler` gives schedules of {', '.join(self.by_name)}, but the saved ones are of"
                f" {', '.join(state_dict)}."
            )
        for name, scheduler in self.by_name.items():
            scheduler.load_state_dict(state_dict[name])


def optimizers_of(optimizer: Optimizer) -> dict[str, Optimizer]:
    """The optimizers by name. A single optimizer has the name ""."""
    return optimizer.by_name if isinstance(optimizer, Optimizers) else {"": optimizer}


def schedulers_of(lr_scheduler: Any) -> dict[str, Any]:
    """The schedulers by the name of their optimizer. A single one for all has the name "". Empty: there is none."""
    if lr_scheduler is None:
        return {}
    return lr_scheduler.by_name if isinstance(lr_scheduler, LRSchedulers) else {"": lr_scheduler}


def group_names(optimizer: Optimizer) -> list[str]:
    """A name for each parameter group: its "name", else its number. With several optimizers it is the optimizer's name,
    followed by that of the group if the optimizer has several: "muon", "adamw/0".
    """
    names = []
    for name, part in optimizers_of(getattr(optimizer, "optimizer", optimizer)).items():
        own = [str(group.get("name", i)) for i, group in enumerate(part.param_groups)]
        names += own if not name else [name] if len(own) == 1 else [f"{name}/{group}" for group in own]
    return names
