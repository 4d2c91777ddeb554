"""Compares the settings of `accelerate launch` with those of the script.

In Accelerate, for some settings the argument wins over the environment, and for others the environment wins. And if it
cannot do what was asked, it silently trains in another way. Each such case is an error here, or is made to work.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from ..errors import TrainloopWarning, describe
from ..ranks import collectives, rendezvous
from .deterministic import choose_determinism

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

rendezvous.install()  # on import: a script may make its `Accelerator` before the trainer

_PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"
_FSDP1 = (
    "The launch configuration asks for FSDP version 1, which trainloop does not support. Use FSDP2: `--fsdp_version 2`,"
    " or `fsdp_version: 2` under `fsdp_config`."
)
_ONE_STATE = (
    "Accelerate keeps the settings of the first `Accelerator` or trainer for the whole process. Give every"
    " `Accelerator` and trainer of the process the same `mixed_precision` and device, or start a process for each."
)
_FP8 = (
    "trainloop does not support `mixed_precision` 'fp8' yet: it runs through Transformer Engine, MS-AMP or torchao, and"
    " trainloop is tested with none of them. Use 'bf16'."
)
_STRATEGIES = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_MUSA,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_HPU,
    DistributedType.MULTI_SDAA,
    DistributedType.MULTI_NEURON,
    DistributedType.FSDP,
}


def launched_mixed_precision() -> str | None:
    """The launch's mixed precision, or `None`. The launcher also says "no" when nobody chose it, so "no" counts as
    None.
    """
    value = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if value == "no" else value


def resolve_mixed_precision(argument: str | None) -> str | None:
    """The mixed precision to pass to `Accelerator`: the argument, after comparing it with the launch."""
    launched = launched_mixed_precision()
    if argument is not None and launched is not None and argument != launched:
        raise ValueError(
            f"`mixed_precision` is {argument!r}, but the launch configuration says {launched!r}. Give it in one place:"
            f" drop the argument, or launch with `--mixed_precision {argument}`."
        )
    if "fp8" in (argument, launched):
        raise ValueError(_FP8)
    return argument


def resolve_accumulation(argument: int | None) -> int:
    """Micro-batches a step: the argument, or the launch's value, or 1. Raise if both are given and differ: Accelerate
    would follow the environment and ignore the script.
    """
    text = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if text is None:
        return argument if argument is not None else 1
    try:
        launched = int(text)
    except ValueError as ex:
        raise ValueError(f"`ACCELERATE_GRADIENT_ACCUMULATION_STEPS` must be a number, but is {text!r}.") from ex
    if launched < 1:
        raise ValueError(f"`ACCELERATE_GRADIENT_ACCUMULATION_STEPS` must be at least 1, but is {launched}.")
    if argument is not None and argument != launched:
        raise ValueError(
            f"`gradient_accumulation_steps` is {argument}, but the launch configuration says {launched}. Give it in one"
            " place: drop the argument, or make both equal."
        )
    return launched


def check_fsdp_version() -> None:
    """Raise for FSDP version 1. Call before an `Accelerator` is built, which fails less clearly without a GPU."""
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(_FSDP1)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def check_accelerator(
    accelerator: Accelerator,
    *,
    mixed_precision: str | None,
    gradient_accumulation_steps: int | None,
    device: torch.device | None,
    is_ours: bool,
) -> None:
    """Raise if the run's `Accelerator` does not match the request.

    Args:
        accelerator: The accelerator that the run will use.
        mixed_precision: The trainer's argument.
        gradient_accumulation_steps: The trainer's argument.
        device: The trainer's argument.
        is_ours: Built by `BaseTrainer.build_accelerator` itself, not by the user.

    Raises:
        ValueError: The message names the argument, its value, and what the run would do.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        if _is_set("ACCELERATE_USE_CPU") or (device is not None and device.type == "cpu"):
            raise ValueError(
                f"{launched} processes were launched, but each believes that it is alone, because the script created a"
                " `PartialState()` first. Unlike `Accelerator()`, it doesn't read `ACCELERATE_USE_CPU`, and it decides"
                " for the whole process. Create it after the trainer, or as `PartialState(cpu=True)`."
            )
        raise ValueError(
            f"{launched} processes were launched, but each believes that it is alone, because no device was found that"
            " they could share. To run them on the CPU, set `ACCELERATE_USE_CPU=true` before `accelerate launch`."
        )
    if accelerator.distributed_type not in _STRATEGIES:
        raise ValueError(
            f"trainloop does not support {accelerator.distributed_type} yet, which the launch configuration asks for."
            " Use one process, DDP (`--multi_gpu`) or FSDP2 (`--use_fsdp --fsdp_version 2`)."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(_FSDP1)
    parallelism = accelerator.parallelism_config
    for kind in ("tp", "cp", "sp"):
        size = getattr(parallelism, f"{kind}_size", 1)
        if size > 1:
            raise ValueError(
                f"The launch configuration asks for {kind}_size {size}, which trainloop does not support yet: every"
                " rank draws data of its own. Use dp_replicate_size and dp_shard_size."
            )
    wanted = mixed_precision or launched_mixed_precision() or ("no" if is_ours else None)
    if wanted is not None and accelerator.mixed_precision != wanted:
        raise ValueError(
            f"`mixed_precision` should be {wanted!r}, but this process's Accelerator runs with"
            f" {accelerator.mixed_precision!r}. {_ONE_STATE}"
        )
    if accelerator.mixed_precision == "fp8":
        raise ValueError(_FP8)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "`mixed_precision` 'fp16' needs a GPU: on the CPU Accelerate would train in fp32 without saying so. Use"
            " 'bf16' or 'no'."
        )
    if not is_ours and gradient_accumulation_steps is not None:
        own = accelerator.gradient_accumulation_steps
        if own not in (1, gradient_accumulation_steps):
            raise ValueError(
                f"`gradient_accumulation_steps` is {gradient_accumulation_steps}, but the `Accelerator` was built with"
                f" {own}. Give it in one place."
            )
    if device is not None and not _is_same(device, accelerator.device):
        raise ValueError(
            f"`device` is '{device}', but Accelerate runs this process on '{accelerator.device}'. Choose devices at"
            " launch (`--gpu_ids`, `CUDA_VISIBLE_DEVICES`). To run on the CPU, pass 'cpu' to the first trainer of"
            " the process, and create no `Accelerator()` or `PartialState()` before it."
        )


def _is_same(device: torch.device, own: torch.device) -> bool:
    """Whether the process runs on `device`. One without an index is the current one: Accelerate names it so."""
    index = own.index
    if device.index is not None and index is None and own.type != "cpu":
        index = torch.get_device_module(own).current_device()
    return device.type == own.type and device.index in (None, index)


def parse_device(device: torch.device | str | int | None) -> torch.device | None:
    """The `device` argument as a `torch.device`."""
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as ex:
        raise ValueError(f"`device` must name a torch device, for example 'cpu' or 'cuda', but is {device!r}.") from ex


def choose_accelerator(
    trainer: BaseTrainer,
    given: Accelerator | None,
    gradient_accumulation_steps: int | None,
    device: torch.device | str | int | None,
    base: type[BaseTrainer],
) -> None:
    """Give `trainer` its accelerator, and the settings that depend on the launch. Sets `accelerator`,
    `gradient_accumulation_steps`, `mixed_precision` and the timeout of the process groups.

    Args:
        trainer: The trainer, with the settings from its arguments.
        given: The argument `accelerator`.
        gradient_accumulation_steps: The argument of that name.
        device: The argument of that name.
        base: `BaseTrainer`, whose `build_accelerator` may be overridden.

    Raises:
        TypeError: `build_accelerator` did not return an accelerator.
        ValueError: The launch, the accelerator and the arguments contradict each other.
    """
    device = parse_device(device)
    choose_determinism(trainer.deterministic)
    trainer._forces_cpu = device is not None and device.type == "cpu"
    if given is None:
        check_fsdp_version()
        trainer.gradient_accumulation_steps = resolve_accumulation(gradient_accumulation_steps)
        built: Any = trainer.build_accelerator()
        if not isinstance(built, Accelerator):
            raise TypeError(f"`build_accelerator` must return an Accelerator, but returned {describe(built)}.")
        trainer.accelerator = built
    else:
        trainer.accelerator = given
    asked = gradient_accumulation_steps or trainer.accelerator.gradient_accumulation_steps
    trainer.gradient_accumulation_steps = resolve_accumulation(asked)
    rehearse_fsdp2_on_cpu(trainer.accelerator)
    check_accelerator(
        trainer.accelerator,
        mixed_precision=trainer.mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        device=device,
        is_ours=given is None and type(trainer).build_accelerator is base.build_accelerator,
    )
    if trainer.timeout is not None:
        collectives.set_timeout(trainer.timeout)
    trainer.mixed_precision = trainer.accelerator.mixed_precision


def default_accelerator(trainer: BaseTrainer) -> Accelerator:
    """The accelerator for the trainer's arguments and the launch's environment."""
    timeout = [InitProcessGroupKwargs(timeout=trainer.timeout)] if trainer.timeout is not None else []
    accumulation = GradientAccumulationPlugin(num_steps=trainer.gradient_accumulation_steps, sync_with_dataloader=False)
    try:
        with without_parallelism_on_cpu():
            return Accelerator(
                cpu=trainer._forces_cpu,
                mixed_precision=trainer.mixed_precision,
                gradient_accumulation_plugin=accumulation,
                kwargs_handlers=[*timeout, *trainer._kwargs_handlers],
            )
    except ValueError as ex:
        if "already been initialized" not in str(ex):
            raise
        asked = "`device` is 'cpu'" if "cpu=True" in str(ex) else f"`mixed_precision` is {trainer.mixed_precision!r}"
        raise ValueError(f"{asked}, but this process already has an `Accelerator` without it. {_ONE_STATE}") from ex


@contextmanager
def without_parallelism_on_cpu() -> Iterator[None]:
    """Inside this context, an `Accelerator` can be built for a rehearsal of HSDP. Accelerate refuses a
    `ParallelismConfig` for plain CPU processes, so it is hidden here. `rehearse_fsdp2_on_cpu` sets it again.
    """
    rehearses = _is_set("ACCELERATE_USE_CPU") and _is_set("ACCELERATE_USE_FSDP")
    hidden = os.environ.pop(_PARALLELISM, None) if rehearses else None
    try:
        yield
    finally:
        if hidden is not None:
            os.environ[_PARALLELISM] = hidden


def rehearse_fsdp2_on_cpu(accelerator: Accelerator) -> None:
    """Make FSDP2 work on CPU processes if the launch asks for it. Accelerate would silently use DDP.

    It lets you debug a multi-node configuration on a laptop. This sets the state that Accelerate itself sets on a GPU
    (`AcceleratorState.__init__`); a canary test watches it.
    """
    from accelerate.state import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
    from torch.distributed.fsdp import OffloadPolicy

    if not _is_set("ACCELERATE_USE_FSDP") or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    if "FSDP_VERSION" not in os.environ:  # the launcher sets both variables; a plugin of the script sets only one
        raise ValueError(
            "The `Accelerator` has an FSDP plugin of the script, which Accelerate ignores on CPU processes. To rehearse"
            " FSDP2 on the CPU, ask for it at launch: `accelerate launch --use_fsdp --fsdp_version 2`."
        )
    if accelerator._models:
        raise ValueError(
            "The launch asks for FSDP2 on CPU processes, but the script's `Accelerator` has already prepared a model,"
            " for which Accelerate uses DDP there. Give the trainer model and optimizer unprepared."
        )
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version == 2:
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        plugin.cpu_offload = OffloadPolicy()  # means no offload: the parameters are on the CPU anyway
        accelerator.state.fsdp_plugin = plugin
        if accelerator.is_main_process:
            warnings.warn(
                "FSDP2 runs on CPU processes. Use this to test a launch configuration; it is too slow for training.",
                TrainloopWarning,
                stacklevel=4,  # the line that makes the trainer
            )
    else:
        accelerator.state.fsdp_plugin = plugin  # `check_accelerator` refuses it, with a remedy
    if _is_set(_PARALLELISM):
        config = ParallelismConfig()
        accelerator.state.parallelism_config = config
        accelerator.state.device_mesh = config.get_device_mesh("cpu")
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def choose_fsdp2_precision(accelerator: Accelerator) -> bool:
    """Reduce FSDP2's gradients in fp32 if Accelerate's default policy is in use. Return whether it is.

    By default Accelerate reduces in bf16 and returns a bf16 loss; DDP with autocast does neither. A policy of the user
    is not changed. The caller must cast the model's output. The policy's `output_dtype` can't do that: it would apply
    to every wrapped layer, and a layer that returns fp32 breaks the next one, whose weights are bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    policy = plugin.mixed_precision_policy
    if low is None or policy is None or (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) != (low,) * 3:
        return False
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=low,
        reduce_dtype=torch.float32,
        cast_forward_inputs=policy.cast_forward_inputs,
    )
    return True
