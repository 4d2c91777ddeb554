"""Which modules are in training mode while the run trains."""

from __future__ import annotations

from torch import nn


class Modes:
    """The modes that `build_model` has chosen.

    A part in eval mode below a model in training mode stays so, as a frozen backbone whose running statistics must not
    move. A model that comes whole in eval mode (`from_pretrained`) trains whole.

    Args:
        model: The model without its wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._in_eval_mode = [part for part in model.modules() if not part.training] if model.training else []

    def begin(self, prepared: nn.Module) -> None:
        """Bring the prepared model into training mode, if it isn't. A part that has since been put into eval mode by a
        hook stays so.
        """
        if prepared.training and self._model.training:
            return
        prepared.train()
        for part in self._in_eval_mode:
            part.training = False
