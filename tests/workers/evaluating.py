"""Loads weights, predicts, collects and compares samples on any number of ranks, and writes what each rank found.

Usage: accelerate launch evaluating.py FOLDER NAME
Or: accelerate launch -m trainloop evaluate tests.workers.evaluating:make_trainer CHECKPOINT, with the workspace in
TRAINLOOP_TEST_WORKSPACE.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import evaluate as evaluate_package
import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trainloop import (
    BaseHook,
    BaseTrainer,
    CheckpointingHook,
    EmaHook,
    EvaluationHook,
    PerSample,
    gather_samples,
)
from trainloop.checkpoint import BestK, Checkpoint
from trainloop.data import per_rank
from trainloop.evaluation.collected import joined
from trainloop.ranks import collectives
from trainloop.records import map_nested

NUM_SAMPLES = 27  # seven batches of four: divisible by neither two nor three, and the last one is not full


def samples(num: int = NUM_SAMPLES) -> torch.Tensor:
    """Num x 3: noise, and the sample's number twice."""
    noise = torch.randn(num, generator=torch.Generator().manual_seed(1))
    return torch.stack([noise, torch.arange(num).float(), torch.arange(num).float()], 1)


class Trainer(BaseTrainer):
    """A model of one input on the noise; each sample knows its number."""

    with_hooks: tuple[BaseHook, ...] = ()

    def build_data_loader(self) -> Any:
        return DataLoader(TensorDataset(samples()), batch_size=3, shuffle=True)

    def build_eval_data_loader(self) -> Any:
        return DataLoader(TensorDataset(samples()), batch_size=4)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def build_hooks(self) -> list[BaseHook]:
        return list(self.with_hooks)

    def forward(self, batch: Any) -> Any:
        return (self.model(batch[0][:, :1]) - 1).pow(2).mean(), {}

    def predict_forward(self, batch: Any) -> Any:
        (samples,) = batch
        squares = self.model(samples[:, :1]).pow(2)
        names = [f"sample {number:.0f}" for number in samples[:, 1]]
        return {"squares": squares, "names": names, "pair": (samples[:, 1], samples[:, 2].cpu().numpy())}


def make(*hooks: BaseHook, max_steps: int = 4, **kwargs: Any) -> Trainer:
    trainer = Trainer(max_steps, seed=3, **kwargs)
    trainer.with_hooks = hooks
    return trainer


def make_trainer() -> Trainer:
    """The one of `python -m trainloop evaluate`."""
    hooks = EvaluationHook(1), CheckpointingHook(1, keep=[BestK("val/loss", 4)]), EmaHook(0.9)
    return make(*hooks, workspace=os.environ["TRAINLOOP_TEST_WORKSPACE"])


def whole(tensor: Any) -> Any:
    """A tensor without its shards, as nested lists. Call on every rank."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().tolist()


def loaded_weights(folder: Path) -> dict[str, Any]:
    """Whether each group of each checkpoint is what the model has after `load_weights`, and its loss."""
    found: dict[str, Any] = {}
    trainer = make(CheckpointingHook(1, path=folder))
    for path in sorted(folder.glob("step_*")):
        for ema in (None, "ema"):
            loss = trainer.evaluate()["loss"]  # FSDP2 now holds gathered weights, which must not be used again
            assert trainer.load_weights(int(path.name[5:]), ema=ema) == path
            checkpoint = Checkpoint.open(path)
            described = checkpoint.tensors(ema or "model").items()
            saved = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described}
            checkpoint.read_into(ema or "model", saved)
            state = trainer.live_model_state()
            differing = [name for name in saved if whole(state[name]) != saved[name].tolist()]
            loss = trainer.evaluate()["loss"]
            found[f"{path.name} {ema}"] = {"differing": differing, "loss": loss}
    return found


# ---------------------------------------------------------------------- predictions, records by sample


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((sample,) for sample in samples())


class Own(IterableDataset[Any]):
    """Batches that each rank reads for itself: rank r has every sample whose number is r modulo the ranks'."""

    def __iter__(self) -> Iterator[Any]:
        rank, world_size = collectives.rank(), collectives.world_size()
        return ((samples()[i : i + 1],) for i in range(rank, NUM_SAMPLES, world_size))


def plain(nested: Any) -> Any:
    return map_nested(lambda leaf: leaf.tolist(), nested, lambda leaf: isinstance(leaf, torch.Tensor | numpy.ndarray))


def predictions() -> dict[str, Any]:
    """Of the same samples in every kind of container; the one of a single batch leaves most ranks without any."""
    trainer = make()
    found: dict[str, Any] = {}
    for name, data, limit in (
        ("default", None, None),
        ("list", [(part,) for part in samples().split(4)], None),
        ("iterable", DataLoader(Stream(), batch_size=4), None),
        ("per_rank", per_rank(DataLoader(Own(), batch_size=None)), None),
        ("limited", None, 5),
        ("limited_list", [(part,) for part in samples().split(4)], 5),
        ("limited_per_rank", per_rank(DataLoader(Own(), batch_size=None)), 1),
        ("one_batch", [(samples(3),)], None),
        ("samples", DataLoader(TensorDataset(samples()), batch_size=None, collate_fn=lambda x: (x[0][None],)), None),
    ):
        found[name] = plain(trainer.predict(data, limit_batches=limit))
    found["mapping"] = plain(trainer.predict({"a": [(samples(5),)], "b": [(samples(2),)]}))["b"]
    written: list[Any] = []
    assert trainer.predict(on_batch=written.append) is None
    found["written"] = plain(joined(written, "")) if written else None
    assert all(module.training for module in trainer.model.modules())
    return found


class Exact(evaluate_package.Metric):  # type: ignore[misc]
    """The share of predictions that are right, and the predictions as they came."""

    def _info(self) -> Any:
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate_package.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        right = [p == r for p, r in zip(predictions, references, strict=True)]
        return {"exact": sum(right) / len(right), "first": predictions[0], "count": len(right)}


class Recorder(Trainer):
    """Records by sample, an object of `evaluate`, and numbers derived from both."""

    exact: Any = None

    def eval_forward(self, batch: Any) -> Any:
        loss, _ = self.forward(batch)
        numbers = batch[0][:, 1].long()
        self.exact.add_batch(predictions=numbers, references=numbers - (numbers == 5).long())
        return loss, {
            "by": {"number": PerSample(numbers), "name": PerSample([str(n) for n in numbers.tolist()])},
            "hf": self.exact,
        }

    def finish_evaluation(self, metrics: dict[str, Any]) -> dict[str, Any]:
        by = metrics["by"]
        assert by["name"] == [str(number) for number in by["number"].tolist()]
        return {**metrics, "perplexity": math.exp(metrics["loss"]), "numbers": len(set(by["number"].tolist()))}


def records(folder: Path) -> dict[str, Any]:
    """What is evaluated, and what a run logs of it."""
    logged: list[Any] = []

    class Log(BaseHook):
        def on_log(self, trainer: BaseTrainer, records: Any, dry_run: bool) -> None:
            logged.append(records)

    trainer = Recorder(1, seed=3)
    trainer.with_hooks = (EvaluationHook(1, limit_batches=4), Log())
    trainer.exact = Exact(cache_dir=str(folder / "metrics"))
    trainer._build()
    whole, limited = plain(trainer.evaluate()), plain(trainer.evaluate(limit_batches=3))
    assert plain(trainer.evaluate()) == whole, "nothing is left of an evaluation"
    trainer.train()
    return {"whole": whole, "limited": limited, "logged": logged[0]}


# ---------------------------------------------------------------------- losses that compare the samples of all ranks


class Towers(nn.Module):
    forward_methods = ("encode",)

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 8)), nn.Linear(2, 8)

    def forward(self, batch: torch.Tensor) -> Any:
        return self.image(batch[:, :1]), self.text(batch[:, 1:] / NUM_SAMPLES)

    encode = forward


class Clip(BaseTrainer):
    data: Any = None
    batch_size = 4
    gather = staticmethod(gather_samples)
    sizes: tuple[list[int], ...] = ()

    def build_data_loader(self) -> Any:
        return self.data or DataLoader(TensorDataset(samples()), batch_size=self.batch_size)

    def build_model(self) -> nn.Module:
        self.losses: list[torch.Tensor] = []
        self.sizes = ([], [])
        return Towers()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def build_hooks(self) -> list[BaseHook]:
        return [LossLog()]

    def forward(self, batch: Any) -> Any:
        images, texts = self.model.encode(batch[0]) if self.step % 2 else self.model(batch[0])
        (all_images, start), (all_texts, _) = self.gather(images), self.gather(texts)
        self.sizes[0].append(len(images))
        self.sizes[1].append(len(all_images))
        labels = torch.arange(len(images)) + start
        one_way = nn.functional.cross_entropy(images @ all_texts.T, labels)
        return (one_way + nn.functional.cross_entropy(texts @ all_images.T, labels)) / 2, {}


class LossLog(BaseHook):
    """The mean loss of all ranks at each step."""

    def on_after_step(self, trainer: Any) -> None:
        loss = trainer.step_info.loss.item()
        trainer.losses.append(sum(collectives.gather_objects(loss)) / collectives.world_size())


def raw_gather(own: torch.Tensor) -> tuple[torch.Tensor, int]:
    """As most scripts do it: every rank must have as many samples."""
    gathered = [torch.empty_like(own) for _ in range(collectives.world_size())]
    dist.all_gather(gathered, own)
    return torch.cat(gathered), len(own) * collectives.rank()


def clip(global_batch_size: int = 12) -> dict[str, Any]:
    """Losses of a training and of an evaluation, with equal and unequal batches; what is refused."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Clip(4, seed=3)
    trainer.batch_size = global_batch_size // world_size
    trainer.train()
    found: dict[str, Any] = {"training": trainer.losses}
    evaluated = Clip(1, seed=3)
    found["evaluation"] = evaluated.evaluate([(part,) for part in samples().split(4)])["loss"]
    found["one_batch"] = evaluated.evaluate([(samples(3),)])["loss"]
    found["sizes"] = evaluated.evaluate([(part,) for part in samples(23).split(4)])["loss"]
    ragged = Clip(5, seed=3)
    ragged.data = [(part,) for part in samples().split(4)]
    ragged.train()
    found["ragged"] = {"losses": ragged.losses, "sizes": ragged.sizes}
    if world_size > 1:
        evaluated.gather = raw_gather  # type: ignore[method-assign]
        for name, num in (("raw_padding", NUM_SAMPLES), ("raw_sizes", 23), ("raw_even", 24)):
            try:
                loss = evaluated.evaluate([(part,) for part in samples(num).split(4)])["loss"]
            except ValueError as ex:
                found[name] = str(ex)
            else:
                found[name] = loss
    return found


# ---------------------------------------------------------------------- state of hooks


class Stateful(BaseHook):
    """Keeps sharded tensors in lists and dicts, and what differs from rank to rank."""

    def on_before_train(self, trainer: BaseTrainer) -> None:
        self.loaded: Any = None
        self.rank = trainer.accelerator.process_index
        self.moments = {name: 2 * param.detach() for name, param in trainer.named_parameters().items()}
        self.odd = torch.arange(10.0).reshape(5, 2)
        meshes = [moment.device_mesh for moment in self.moments.values() if hasattr(moment, "device_mesh")]
        if meshes:
            from torch.distributed.tensor import Shard, distribute_tensor

            self.odd = distribute_tensor(self.odd, meshes[0], [Shard(0)])

    def on_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        state_dict["nested"] = {"list": [self.moments, (self.odd, 7)], "common": torch.ones(2)}
        state_dict["flat"] = {"odd": self.odd, "other": self.odd * 2}
        state_dict["mine"] = {"rank": self.rank, "tensor": torch.full((2,), self.rank), "odd": self.odd}
        state_dict["own_tensors"] = {"seen": torch.full((3,), self.rank)}
        if self.rank == 0:
            state_dict["first"] = "rank 0"

    def on_load_state_dict(self, trainer: BaseTrainer, state_dict: dict[str, Any]) -> None:
        self.loaded = {key: state_dict[key] for key in ("nested", "flat", "mine", "own_tensors", "first")}


def form_of(nested: Any) -> Any:
    """The values of tensors, and whether they are sharded; what belongs to the ranks. Call on every rank."""
    return map_nested(
        lambda t: [whole(t), hasattr(t, "placements")], nested, lambda leaf: isinstance(leaf, torch.Tensor)
    )


def hook_state(folder: Path, name: str) -> dict[str, Any]:
    """What a hook is given back of what it saved, here and in each launch before this one."""
    hook = Stateful()
    make(hook, CheckpointingHook(1, path=folder / f"hooks_{name}"), max_steps=1).train()
    found = {}
    for path in sorted(folder.glob("hooks_*/step_0000001")):
        loader = Stateful()
        make(loader, CheckpointingHook(1, path=folder / "unused" / name, load=path), max_steps=1).train()
        found[path.parent.name.removeprefix("hooks_")] = form_of(loader.loaded)
    own: dict[str, Any] = {}
    hook.on_state_dict(make(), own)
    own.setdefault("first", "rank 0")
    return {"saved": form_of(own), "loaded": found}


def main(folder: Path, name: str) -> None:
    os.environ["TRAINLOOP_TEST_WORKSPACE"] = str(folder / name)
    trainer = make_trainer()
    trainer.train()
    rank = trainer.accelerator.process_index
    result = {
        "loaded": loaded_weights(folder / name / "checkpoints"),
        "last": trainer.evaluate()["loss"],
        "predictions": predictions(),
        "records": records(folder),
        "clip": clip(),
        "hooks": hook_state(folder, name),
    }
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
