"""What is done with all parameters once a step: the average of the weights, and the check of the gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainloop import EmaHook, Trainer
from trainloop.step.gradients import Gradients

from .tasks import CLIP, make_model

Seconds = dict[str, list[float]]
"""CPU seconds of one call, by contender and round."""


def measure(contenders: dict[str, Callable[[], Any]], num_rounds: int, num_calls: int) -> Seconds:
    """In turns; the first round warms up."""
    seconds: Seconds = {name: [] for name in contenders}
    for _ in range(num_rounds + 1):
        for name, call in contenders.items():
            start = time.process_time()
            for _ in range(num_calls):
                call()
            seconds[name].append((time.process_time() - start) / num_calls)
    return {name: values[1:] for name, values in seconds.items()}


def averages(model_name: str, num_rounds: int, num_calls: int) -> Seconds:
    """One update of an average of the weights."""
    return measure(average_contenders(model_name), num_rounds, num_calls)


def average_contenders(model_name: str, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """Each way to update an average of the weights, as one call."""
    model = make_model(model_name).to(device)
    weights = [param.detach() for param in model.parameters()]
    bare = [weight.clone() for weight in weights]
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    hook = EmaHook(0.999)
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        data_loader=[torch.zeros(1)],
        forward=lambda model, batch: (None, {}),
        hooks=[hook],
        max_steps=0,
        device=device,
        seed=0,
    )
    trainer.train()
    trainer.step = 1
    return {
        "_foreach_lerp_ on cached lists": lambda: torch._foreach_lerp_(bare, weights, 0.001),
        "EmaHook": lambda: hook.update_average(trainer),
        "AveragedModel, foreach": lambda: averaged.update_parameters(model),
    }


def finite_checks(model_name: str, num_rounds: int, num_calls: int) -> Seconds:
    """Clipping with a check that the gradient is finite, beside torch's clipping alone."""
    model = make_model(model_name)
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(param.shape, generator=generator) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.SGD(params)
    norm = torch.nn.utils.get_total_norm(grads).item()

    def clip(limit: float) -> Any:
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    def each() -> None:
        assert all(bool(torch.isfinite(param.grad).all()) for param in params if param.grad is not None)
        clip(2 * norm)

    def largest() -> None:
        assert torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], float("inf")).isfinite()
        clip(2 * norm)

    def ours(limit: float) -> Callable[[], None]:
        gradients = Gradients(model.parameters(), limit, None, optimizer)

        def check() -> None:
            norm = gradients.norm()
            gradients.clip(norm, norm.item())

        return check

    contenders: dict[str, Callable[[], Any]] = {
        "torch's clip alone": lambda: clip(2 * norm),
        "isfinite of each, then torch's clip": each,
        "norm(inf), then torch's clip": largest,
        "trainloop, nothing to clip": ours(2 * norm),
        "trainloop, clipping": ours(CLIP * norm * 0.9999),
    }
    return measure(contenders, num_rounds, num_calls)
