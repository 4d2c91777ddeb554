"""The first weights of a run if `build_model` doesn't provide them, for a model on the meta device or with files from
`initial_weights`.

The model is sharded without values. Then each rank fills its shards: by each module's own initialisation, or with its
part of the files. Buffers and frozen parameters are filled even if the run is restored from a checkpoint, which may not
contain them. If these are in the files, all weights are read at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..checkpoint.agreement import Ranks
from ..checkpoint.format.foreign import has_manifest
from ..checkpoint.importing import TensorSource, open_foreign
from ..checkpoint.sharding import find_aliases, local_tensor
from ..errors import CheckpointError, describe
from ..paths import parse_absolute_path
from ..ranks import collectives
from ..step.non_finite import clean_name
from .factories import required_parameters
from .module_init import Slot, Unit, initialise, listed, plan_units, slots_of

if TYPE_CHECKING:
    from ..trainer import BaseTrainer

_NUM_TOLD = 5  # names in an error
_DDP = "module."
_ON_META = "`build_model` returned a model on the meta device"
_REMEDY = (
    "Give these modules a `reset_parameters` that fills their tensors, or build the model under"
    " `accelerate.init_empty_weights()`, which leaves buffers on the CPU, or name a folder of weights in"
    " `initial_weights`"
)


class InitialWeights:
    """Fills the model of a run, once. Call its methods on every rank.

    Args:
        trainer: The trainer. Its model has just been built.

    Raises:
        TypeError: `initial_weights` did not return a path or None.
        ValueError: Something on the meta device cannot be filled, or the ranks have built different models.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        path = trainer.initial_weights()
        if path is not None and not isinstance(path, str | Path):
            raise TypeError(f"`initial_weights` must return a path or None, but returned {describe(path)}.")
        self._path = None if path is None else parse_absolute_path("initial_weights", path)
        model = trainer.unwrapped_model
        self.is_on_meta = _is_on_meta(model)
        """Whether some tensors have no memory yet."""
        if self.is_on_meta:
            _check_supported(model)
            for module in model.modules():  # `accelerate.init_empty_weights` unties what `__init__` has tied
                tie = getattr(module, "tie_weights", None)
                if callable(tie) and not required_parameters(tie):
                    tie()
        on_meta = [slot for slot in _first_slots(model) if slot.tensor.is_meta]
        self._in_file = set(map(clean_name, model.state_dict())) if self._path is not None else set()
        self._names = [slot.name for slot in on_meta if slot.name not in self._in_file]
        self._blank = {slot.name for slot in on_meta}
        checksum = zlib.crc32(repr(sorted(self._blank)).encode())
        if len(set(collectives.gather_objects(checksum))) > 1:
            raise ValueError(
                "`build_model` returned a model with other tensors on the meta device on some ranks than on rank 0."
                " Build it in the same way on every rank: set `fsdp_cpu_ram_efficient_loading` to false in the launch"
                " configuration."
            )
        _, missing = plan_units(model, self._names)
        _check_all_filled(missing)
        self._is_begun = self._is_done = False

    def allocate(self) -> None:
        """Give memory to the tensors on the meta device; in a sharded model, to their shards."""
        model, accelerator = self._trainer.unwrapped_model, self._trainer.accelerator
        device = accelerator.device
        if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_offload is not None:
            from torch.distributed.fsdp import CPUOffloadPolicy

            if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                device = torch.device("cpu")
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the old tensor, so its id stays unique
        with torch.no_grad():
            for slot in slots_of(model):
                tensor = slot.tensor
                if tensor.is_meta and id(tensor) not in made:
                    is_param = isinstance(tensor, nn.Parameter)
                    new = torch.empty_like(tensor.detach(), device=device if is_param else accelerator.device)
                    if new.is_floating_point() or new.is_complex():
                        local_tensor(new).fill_(float("nan"))  # shows if it is read too early
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_param else new
                    made[id(tensor)] = tensor, new
                if id(tensor) in made:
                    slot.store[slot.key] = made[id(tensor)][1]
        if accelerator.is_fsdp2:
            model._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]  # FSDP2 finds its new shards in `_apply`

    def fill_what_stays(self) -> None:
        """Fill buffers and frozen parameters; everything if these are in the files. Call before `BuiltModel.of`."""
        if self._is_done:
            return
        model = self._trainer.unwrapped_model
        self._is_begun = True
        fixed = [s for s in slots_of(model) if not (isinstance(s.tensor, nn.Parameter) and s.tensor.requires_grad)]
        if self._path is not None and any(slot.name in self._in_file for slot in fixed):
            self.fill()
            return
        names = {slot.name for slot in fixed}
        self._initialise([unit for unit in self._units() if any(slot.name in names for slot in unit.slots)])

    def fill(self) -> None:
        """Fill everything that is not filled yet."""
        if self._is_done:
            return
        self._initialise(self._units())
        if self._path is not None:
            fill_from(self._trainer, self._path)
        self.drop()
        what = f"from {self._path}" if self._path is not None else "by each module's own initialisation"
        if self._path is not None or self.is_on_meta:
            self._trainer.logger.info(f"The model begins with weights {what}.")

    def drop(self) -> None:
        """Fill nothing more, because a checkpoint has filled the rest."""
        self._is_done = True

    def _units(self) -> list[Unit]:
        return plan_units(self._trainer.unwrapped_model, self._names)[0] if self._names else []

    def _initialise(self, units: list[Unit]) -> None:
        seed = self._trainer.seed
        assert seed is not None, "the run is being built"
        unfilled = initialise(units, seed, self._trainer.accelerator.device)
        _check_all_filled(unfilled)
        done = {slot.name for unit in units for slot in unit.slots}
        self._names = [name for name in self._names if name not in done]


def fill_from(trainer: BaseTrainer, path: Path) -> None:
    """Read weights into the live model. Call on every rank.

    Raises:
        CheckpointError: On every rank. They cannot be read. Or they belong to another model; nothing was changed then.
    """
    live, ranks = trainer.live_model_state(), Ranks()
    found: list[tuple[TensorSource, dict[str, torch.Tensor]]] = []

    def plan() -> None:
        source = OwnWeights(Checkpoint.open(path)) if has_manifest(path) else open_foreign(path).weights["model"]
        described = source.described()
        names = clean_names(described, live)
        check_weights(path, described, names, live)
        found.append((source, {key: live[name] for key, name in names.items()}))

    ranks.do(plan, _nothing, f"The initial weights in {path} cannot be loaded")
    for source, targets in found:
        ranks.do(partial(source.read_into, targets), _nothing, f"The initial weights in {path} cannot be loaded")


class OwnWeights:
    """The weights in one of our checkpoints, as a source for a model that may have other dtypes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype by name."""
        return self._checkpoint.tensors("model")

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors. Values are cast to the dtype of the target."""
        dtypes = {name: dtype for name, (_, dtype) in self.described().items()}
        read = {
            name: target if target.dtype == dtypes[name] else torch.empty_like(target.detach(), dtype=dtypes[name])
            for name, target in targets.items()
        }
        self._checkpoint.read_into("model", read)
        for name, target in targets.items():
            if read[name] is not target:
                local_tensor(target).copy_(local_tensor(read[name]))


def clean_names(names: Iterable[str], live: Mapping[str, Any]) -> dict[str, str]:
    """The model's name for each name in a file. A wrapped model may have written the file."""
    clean = {name: clean_name(name) for name in names}
    while clean and not live.keys() & set(clean.values()) and all(name.startswith(_DDP) for name in clean.values()):
        clean = {key: name.removeprefix(_DDP) for key, name in clean.items()}
    return clean


def check_weights(path: Path, described: Mapping[str, Any], names: Mapping[str, str], live: Mapping[str, Any]) -> None:
    """Raise unless a file holds the weights of the model.

    Args:
        path: The file or folder.
        described: Shape and dtype by name in the file.
        names: The model's name by name in the file.
        live: The model's tensors.

    Raises:
        CheckpointError: It names what differs.
    """
    found = set(names.values())
    first_names = find_aliases(live)
    held = {first_names.get(name, name) for name in found}  # a file may have any one of several tied tensors
    complaints = [
        told("not in the file", sorted(name for name in live if first_names.get(name, name) not in held)),
        told("not in the model", sorted(found - live.keys())),
        told(
            "of another shape",
            [
                f"{name} is {list(described[key][0])} there, but {list(live[name].shape)} here"
                for key, name in names.items()
                if name in live and described[key][0] != tuple(live[name].shape)
            ],
        ),
    ]
    if any(complaints):
        raise CheckpointError(
            f"The weights in {path} are not those of this run's model; nothing was changed."
            f" {' '.join(filter(None, complaints))} What fits only in part, load in `build_model`"
        )


def told(what: str, names: list[str]) -> str:
    """A sentence with the first few names. Empty if there are none."""
    more = f", and {len(names) - _NUM_TOLD} more" if len(names) > _NUM_TOLD else ""
    return f"{len(names)} {what}: {', '.join(names[:_NUM_TOLD])}{more}." if names else ""


def _is_on_meta(model: nn.Module) -> bool:
    return any(slot.tensor.is_meta for slot in slots_of(model))


def _first_slots(model: nn.Module) -> list[Slot]:
    """The slots of parameters and buffers. Of a tied tensor, only the first one."""
    first: dict[int, Slot] = {}
    for slot in slots_of(model):
        first.setdefault(id(slot.tensor), slot)
    return list(first.values())


def _check_supported(model: nn.Module) -> None:
    """Raise if peft's adapters are on the meta device: peft initialises adapters only when it creates them."""
    for name, module in model.named_modules():
        if hasattr(type(module), "reset_lora_parameters") and _is_on_meta(module):
            raise ValueError(
                f"{_ON_META} with adapters of peft (first: {name}). Build it on the CPU: peft initialises adapters when"
                " it adds them, and not later."
            )


def _check_all_filled(names: list[str]) -> None:
    if names:
        raise ValueError(f"{_ON_META}, and nothing initialises {len(names)} tensors: {listed(names)}. {_REMEDY}.")


def _nothing(*_: Any) -> None:
    return None
