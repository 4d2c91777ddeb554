"""Weights without a training, predictions, values by sample, and losses that compare the samples of all ranks: at any
number of processes they are those of one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import evaluate as evaluate_package
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import (
    CheckpointError,
    CheckpointingHook,
    EmaHook,
    EvaluationHook,
    PerSample,
    Trainer,
    gather_samples,
)
from trainloop.__main__ import main
from trainloop.checkpoint import BestK, Checkpoint
from trainloop.checkpoint.best import Best, parse_best

from .folders import flip
from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer
from .workers import evaluating as worker

WORKER = REPOSITORY / "tests" / "workers" / "evaluating.py"
FORMS = ["ddp2", "ddp3", "fsdp2"]
LOSSES = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: math.nan, 6: 6.0}
STEPS = len(LOSSES)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(15.0).reshape(5, 3) / 15), batch_size=2)


def make(
    workspace: Path, max_steps: int = STEPS, *, load: Any = "latest", keep: Any = (), **kwargs: Any
) -> SmallTrainer:
    """A run whose loss and accuracy at each step are those of LOSSES; it keeps every checkpoint."""

    def hooks(trainer: SmallTrainer) -> list[Any]:
        saves = CheckpointingHook(1, keep_previous=STEPS, load=load, keep=list(keep))
        return [EvaluationHook(1, data_loader=data()), EmaHook(0.5), saves]

    trainer = SmallTrainer(max_steps, workspace=workspace, hooks_=hooks, **kwargs)
    trainer.eval_forward = lambda batch: (  # type: ignore[method-assign]
        None,
        {"loss": LOSSES[max(1, trainer.step)], "accuracy": -LOSSES[max(1, trainer.step)]},
    )
    return trainer


def weights(trainer: SmallTrainer) -> list[Any]:
    return [param.tolist() for param in trainer.model.parameters()]


def saved(folder: Path, group: str = "model") -> list[Any]:
    checkpoint = Checkpoint.open(folder)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(group).items()}
    checkpoint.read_into(group, tensors)
    return [tensors["weight"].tolist(), tensors["bias"].tolist()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a finished run with six checkpoints."""
    workspace = tmp_path_factory.mktemp("run")
    make(workspace, keep=[BestK("val/loss")]).train()
    return workspace


def test_weights_are_loaded_by_step_metric_and_path(run: Path, tmp_path: Path) -> None:
    """Each way finds the checkpoint that is meant, and the model then has its weights or its average, bit for bit. The
    folder is neither locked nor changed.
    """
    folder = run / "checkpoints"
    before = sorted(str(path) for path in run.rglob("*"))
    for which, step in (
        (3, 3),
        ("latest", 6),
        ("best", 2),  # of equal values the earlier; never the one with NaN
        ("best:val/loss", 2),
        ("best:val/loss:max", 6),
        ("best:val/accuracy:max", 2),
        ("best:val/accuracy", 6),
        (folder / "step_0000004", 4),
        (str(folder), 6),
    ):
        trainer = make(run)
        found = trainer.load_weights(which)
        assert found == folder / f"step_{step:07d}", which
        assert weights(trainer) == saved(found), which
        trainer.load_weights(which, ema="ema")
        assert weights(trainer) == saved(found, "ema") != saved(found), which
    assert sorted(str(path) for path in run.rglob("*")) == before
    exported = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1, 3), "bias": torch.ones(1)}, exported)
    trainer = make(tmp_path)
    assert trainer.load_weights(exported) == exported
    assert weights(trainer) == [[[1.0] * 3], [1.0]]


def test_the_best_weights_are_tested_after_the_training(tmp_path: Path) -> None:
    """`train`, then `load_weights("best")`, then `evaluate`: the numbers are those of these weights. A further `train`
    would mix two states and is refused, until `load_state_dict` has brought a whole one.
    """
    trainer = make(tmp_path, keep=[BestK("val/loss")])
    trainer.train()
    state = {key: value for key, value in trainer.state_dict().items() if key != "rank"}
    state["model"] = {name: tensor.clone() for name, tensor in state["model"].items()}
    trainer.load_weights("best")
    trainer.eval_forward = trainer.forward  # type: ignore[method-assign]
    weight, bias = map(torch.tensor, saved(tmp_path / "checkpoints" / "step_0000002"))
    wanted = nn.functional.linear(data().dataset.tensors[0], weight, bias).pow(2).mean().item()  # type: ignore[attr-defined]
    assert math.isclose(trainer.evaluate(data())["loss"], wanted, rel_tol=1e-6)
    trainer.max_steps = STEPS + 1
    with pytest.raises(RuntimeError, match="without the optimizer's state and the position in the data"):
        trainer.train()
    trainer.load_state_dict(state)
    trainer.eval_forward = lambda batch: (None, {})  # type: ignore[method-assign]
    trainer.train()
    assert trainer.step == STEPS + 1


def test_a_run_begins_with_the_best_checkpoint(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`CheckpointingHook(load="best:…")` resumes from it, and says why it is the best."""
    make(tmp_path).train()
    for which, step, rank in (("best:val/accuracy:max", 2, "highest"), ("best:val/loss", 2, "lowest")):
        trainer = make(tmp_path, max_steps=2, load=which)
        with caplog.at_level("INFO", "trainloop"):
            trainer.train()
        assert trainer.step == step
        assert weights(trainer) == saved(tmp_path / "checkpoints" / f"step_{step:07d}")
        assert f"is the {rank} of 5 checkpoints" in caplog.text
    with pytest.raises(CheckpointError, match=r'"best" does not say which .* its run had no `BestK`'):
        make(tmp_path, load="best").train()


def test_the_best_checkpoint_is_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`checkpoints export --best METRIC`; not beside `--step`, and not of a single checkpoint."""
    monkeypatch.chdir(tmp_path)
    folder = str(run / "checkpoints")
    for metric, step in (("val/loss", 2), ("val/accuracy:max", 2), ("val/loss:max", 6)):
        assert main(["checkpoints", "export", folder, "--best", metric]) == 0
        assert f"step_{step:07d}, model -> model_step_{step:07d}.safetensors" in capsys.readouterr().out
        Path(f"model_step_{step:07d}.safetensors").unlink()
    assert main(["checkpoints", "export", folder, "--best", "val/loss", "--format", "accelerate"]) == 0
    assert "step_0000002 -> accelerate_step_0000002" in capsys.readouterr().out
    assert main(["checkpoints", "export", folder, "--best", "val/loss", "--step", "1"]) == 2
    assert main(["checkpoints", "export", f"{folder}/step_0000001", "--best", "val/loss"]) == 2
    assert main(["checkpoints", "export", folder, "--best", "val/los"]) == 1
    told = (
        "has no checkpoint with the metric 'val/los'. It has 6 checkpoints, with the metrics: val/accuracy, val/loss."
    )
    assert told in capsys.readouterr().err


def test_a_damaged_best_checkpoint_is_not_replaced_by_another(tmp_path: Path) -> None:
    """The error names it; of a manifest that cannot be read the log says that it may have been better."""
    make(tmp_path).train()
    folder = tmp_path / "checkpoints"
    flip(folder / "step_0000002" / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step_0000002 is the best checkpoint .*, but it is damaged"):
        make(tmp_path).load_weights("best:val/loss")


def test_weights_that_cannot_be_loaded_are_told(run: Path, tmp_path: Path) -> None:
    """By argument, folder and average, with what there is."""
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(1, 4), "bias": torch.ones(1)}, other)
    for which, ema, error, message in (
        (True, None, TypeError, '`which` must be a step, a path, "latest" or "best", but is True'),
        (1, 0.9, TypeError, "`ema` must be the name of an EmaHook or None, but is 0.9"),
        (9, None, CheckpointError, "has no checkpoint of step 9, only of: 1, 2, 3, 4, 5, 6"),
        (1, "emma", CheckpointError, "has no average 'emma'. Its averages: ema"),
        ("best:val/f1", None, CheckpointError, "has no checkpoint with the metric 'val/f1'"),
        ("best:", None, ValueError, "The best checkpoint is named as"),
        (tmp_path / "none", None, CheckpointError, "is not a checkpoint of trainloop: it does not exist"),
        (other, None, CheckpointError, "weight is [1, 4] there, but [1, 3] here"),
        (other, "ema", CheckpointError, "has no average 'ema'. Its averages: none"),
    ):
        with pytest.raises(error) as told:
            make(run).load_weights(which, ema=ema)  # type: ignore[arg-type]
        assert message in str(told.value)
    with pytest.raises(CheckpointError, match="`build_hooks` returns no CheckpointingHook"):
        SmallTrainer(1).load_weights("best")
    with pytest.raises(CheckpointError, match="has no checkpoint, so no weights were loaded"):
        make(tmp_path / "empty").load_weights("latest")

    def load(trainer: SmallTrainer, batch: Any) -> Any:
        trainer.load_weights(1)

    with pytest.raises(RuntimeError, match="`load_weights` was called while `train` runs"):
        SmallTrainer(1, forward_=load).train()


def test_the_name_of_the_best_checkpoint_is_parsed() -> None:
    """A metric may have colons; a path is none."""
    assert parse_best("best:a:b") == Best("a:b")
    assert parse_best("best:a:b:min") == Best("a:b", "min")
    assert parse_best("best") == Best()
    assert [parse_best(which) for which in ("bestof", "./best", 3, Path("best:x"), None)] == [None] * 5
    for wrong in ("best:", "best::max"):
        with pytest.raises(ValueError, match="The best checkpoint is named"):
            parse_best(wrong)


# ---------------------------------------------------------------------- on several ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder, and what each rank of each form has found."""
    folder = tmp_path_factory.mktemp("ranks")
    found: dict[str, Any] = {"folder": folder}
    for form in FORMS:
        options = ["--fsdp_reshard_after_forward", "false"] if "fsdp" in form else []
        launch(WORKER, form, str(folder), form, launch_args=options)
        found[form] = [json.loads((folder / f"{form}.{rank}.json").read_text()) for rank in range(NUM_PROCESSES[form])]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_rank_has_the_weights_that_were_loaded(ranks: dict[str, Any], form: str) -> None:
    """Of each checkpoint, its weights and its average; the losses are the same on every rank, and those of one process
    that loads the same checkpoint.
    """
    first = ranks[form][0]["loaded"]
    assert len(first) == 2 * 4
    assert [found for found in first.values() if found["differing"]] == []
    assert all(own["loaded"] == first for own in ranks[form])
    assert math.isclose(first["step_0000004 None"]["loss"], ranks[form][0]["last"], rel_tol=1e-6)
    assert len({found["loss"] for found in first.values()}) == 7  # the first average is a copy
    alone = worker.loaded_weights(ranks["folder"] / form / "checkpoints")
    assert alone.keys() == first.keys()
    for name, found in alone.items():
        assert found["differing"] == [], name
        assert math.isclose(found["loss"], first[name]["loss"], rel_tol=1e-6), name


def test_the_command_evaluates_a_checkpoint(ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """`accelerate launch -m trainloop evaluate` on two ranks, and `python -m trainloop evaluate` in one process: JSON
    on the standard output, once. A wrong argument is told in one line; an error of the user's code with its traceback.
    """
    workspace = ranks["folder"] / "ddp3"
    environment = {"TRAINLOOP_TEST_WORKSPACE": str(workspace)}
    arguments = ["evaluate", "tests.workers.evaluating:make_trainer"]
    done = launch(Path("-m"), "ddp2", "trainloop", *arguments, "best:val/loss", "--ema", "ema", env=environment)
    losses = {name: found["loss"] for name, found in ranks["ddp3"][0]["loaded"].items()}
    of_steps = {name: losses[name] for name in losses if name.endswith("None")}
    best = min(of_steps, key=of_steps.__getitem__).removesuffix("None")
    text = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    assert math.isclose(json.loads(text)["loss"], losses[f"{best}ema"], rel_tol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*environment.popitem())
        assert main([*arguments, "3"]) == 0
        captured = capsys.readouterr()
        assert math.isclose(json.loads(captured.out)["loss"], losses["step_0000003 None"], rel_tol=1e-6)
        assert f"The evaluation of {workspace / 'checkpoints' / 'step_0000003'}:" in captured.err
        for wrong, code, message in (
            ([*arguments, "9"], 1, "has no checkpoint of step 9"),
            (["evaluate", "tests.workers.evaluating", "1"], 2, "the trainer must be named as MODULE:FUNCTION"),
            (["evaluate", "tests.workers.evaluating:nothing", "1"], 2, "has no function 'nothing'"),
            (["evaluate", "tests.workers.nowhere:make", "1"], 2, "there is no module 'tests.workers.nowhere' here"),
            (["evaluate", "tests.workers.evaluating:samples", "1"], 2, "must return a trainer, but returned"),
        ):
            assert main(wrong) == code
            assert message in capsys.readouterr().err

        def broken(self: Any, batch: Any) -> Any:
            raise ValueError("of the user's")

        patch.setattr(worker.Trainer, "eval_forward", broken)
        assert main([*arguments, "3"]) == 1
        assert "in broken" in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_predictions_come_in_the_order_of_the_data(ranks: dict[str, Any], form: str) -> None:
    """Each sample once, on every rank the same as in one process: tensors, arrays and lists, from every kind of data,
    the first batches of it, and batch by batch on rank 0.
    """
    alone = worker.predictions()
    for rank, own in enumerate(ranks[form]):
        assert (own["predictions"].pop("written") is None) == (rank > 0)
        for name, found in own["predictions"].items():
            numbers = alone[name]["pair"][0]
            assert numbers == list(map(float, range(len(numbers)))), name
            assert found["pair"] == [numbers, numbers], name
            assert found["names"] == [f"sample {n:.0f}" for n in numbers], name
            torch.testing.assert_close(torch.tensor(found["squares"]), torch.tensor(alone[name]["squares"]))
    counts = {name: len(found["names"]) for name, found in alone.items()}
    limited = {"limited": 20, "limited_list": 20, "limited_per_rank": 1, "one_batch": 3, "mapping": 2}
    assert counts == {name: limited.get(name, worker.NUM_SAMPLES) for name in counts}


@pytest.mark.parametrize("form", FORMS)
def test_records_by_sample_and_objects_of_evaluate_are_exact(ranks: dict[str, Any], form: str, tmp_path: Path) -> None:
    """`PerSample`, an object of `evaluate` and what `finish_evaluation` derives are those of one process, of
    all batches and of the first ones. A run logs the numbers among them.
    """
    alone = worker.records(tmp_path)
    assert alone["whole"]["hf"] == {"exact": 26 / 27, "first": 0, "count": 27}
    assert alone["whole"]["by"]["number"] == list(range(27))
    assert alone["limited"]["by"]["number"] == list(range(12))
    assert math.isclose(alone["whole"]["perplexity"], math.exp(alone["whole"]["loss"]))
    for own in ranks[form]:
        for part in ("whole", "limited"):
            found, wanted = own["records"][part], alone[part]
            assert {key: found[key] for key in ("hf", "by", "numbers")} == {
                key: wanted[key] for key in ("hf", "by", "numbers")
            }
            assert math.isclose(found["loss"], wanted["loss"], rel_tol=1e-6)
        assert own["records"]["logged"]["val"].keys() == {"loss", "perplexity", "numbers", "hf"}
        assert own["records"]["logged"]["val"]["numbers"] == 16


def clip_loss(num: int, world_size: int) -> float:
    """The mean over all samples, written out: each is compared with those of its round, of 4 a rank."""
    trainer = worker.Clip(1, seed=3)
    trainer._build()
    batches, total = worker.samples(num).split(4), 0.0
    for begin in range(0, len(batches), world_size):
        together = torch.cat(batches[begin : begin + world_size])
        with torch.no_grad():
            images, texts = trainer.model(together)
        labels = torch.arange(len(together))
        cross_entropy = nn.functional.cross_entropy
        total += (
            (cross_entropy(images @ texts.T, labels) + cross_entropy(texts @ images.T, labels)).item() / 2 * len(labels)
        )
    return total / num


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_that_compares_the_samples_of_all_ranks(ranks: dict[str, Any], form: str) -> None:
    """With `gather_samples`: the losses of a training are those of one process with the same global batch; in an
    evaluation a smaller last batch and a padded one are right, and so are batches of different sizes in a training.
    """
    world_size = NUM_PROCESSES[form]
    alone = worker.clip()
    for own in ranks[form]:
        found = own["clip"]
        torch.testing.assert_close(found["training"], alone["training"], rtol=1e-5, atol=0)
        for name, num in (("evaluation", 27), ("sizes", 23), ("one_batch", 3)):
            assert math.isclose(found[name], clip_loss(num, world_size), rel_tol=1e-6), name
    sizes = [own["clip"]["ragged"]["sizes"] for own in ranks[form]]
    assert all(
        sum(each) == together
        for each, together in zip(zip(*(own for own, _ in sizes), strict=True), sizes[0][1], strict=True)
    )
    assert any(len(set(each)) > 1 for each in zip(*(own for own, _ in sizes), strict=True))
    assert all(own == sizes[0][1] for _, own in sizes)


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_gather_in_an_uneven_round_is_refused(ranks: dict[str, Any], form: str) -> None:
    """It would count a padded batch twice, or abort inside gloo. Every rank raises with the remedy. In even rounds it
    passes, and FSDP2's own collectives are never refused.
    """
    for own in ranks[form]:
        assert (
            "calls a collective (allgather) in a round in which some ranks have no batch left"
            in own["clip"]["raw_padding"]
        )
        assert "Gather with `trainloop.gather_samples`" in own["clip"]["raw_padding"]
        assert "the batches of the ranks have different sizes" in own["clip"]["raw_sizes"]
        assert isinstance(own["clip"]["raw_even"], float)
        assert math.isclose(own["clip"]["raw_even"], clip_loss(24, NUM_PROCESSES[form]), rel_tol=1e-6)


def test_what_cannot_be_collected_is_told(tmp_path: Path) -> None:
    """By name, with what it must be."""
    for values, error, message in (
        (torch.tensor(1.0), ValueError, 'the record "a" must have a value for each sample, but is one number'),
        (3, TypeError, 'the record "a" must be a tensor, an array or a list with a value for each sample'),
        ({"x": torch.ones(2), "y": [1]}, ValueError, 'the record "a" must have as many samples as the others'),
    ):
        trainer = SmallTrainer(1)
        trainer.eval_forward = lambda batch, values=values: (None, {"a": PerSample(values)})  # type: ignore[method-assign]
        with pytest.raises(error) as told:
            trainer.evaluate(data())
        assert message in str(told.value)
    lengths = iter([2, 3, 4])
    trainer = SmallTrainer(1)
    trainer.predict_forward = lambda batch: torch.ones(len(batch[0]), next(lengths))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"must have one shape but for their first dimension.*Pad them to one length"):
        trainer.predict(data())
    trainer.finish_evaluation = lambda metrics: None  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(TypeError, match="`finish_evaluation` must return a mapping of metrics, but returned None"):
        trainer.evaluate(data())
    for method, arguments, error, message in (
        ("predict", {"on_batch": 3}, TypeError, "`on_batch` must be callable, but is 3"),
        ("predict", {"data_loader": {"a": data()}, "on_batch": print}, ValueError, "but the data is a mapping of a"),
        ("predict", {"limit_batches": 0}, ValueError, "`limit_batches` must be at least 1, but is 0"),
        ("evaluate", {"limit_batches": 1.5}, TypeError, "`limit_batches` must be an integer or None, but is 1.5"),
    ):
        with pytest.raises(error, match=message):
            getattr(trainer, method)(**{"data_loader": data(), **arguments})
    with pytest.raises(ValueError, match="`predict` has no data"):
        SmallTrainer(1).predict()
    with pytest.raises(ValueError, match="`limit_batches` must be at least 1"):
        EvaluationHook(1, limit_batches=0)
    with pytest.raises(ValueError, match="`samples` must have a dimension"):
        gather_samples(torch.tensor(1.0))


def test_an_object_of_evaluate_is_empty_after_an_evaluation_that_failed(tmp_path: Path) -> None:
    """The next evaluation counts nothing twice. Objects that cannot be merged over the ranks are refused."""
    trainer = worker.Recorder(1, seed=3)
    trainer.exact = worker.Exact(cache_dir=str(tmp_path))
    wanted = trainer.evaluate()
    forward, calls = trainer.forward, iter(range(100))

    def broken(batch: Any) -> Any:
        if next(calls) == 3:
            raise KeyError
        return forward(batch)

    trainer.forward = broken  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        trainer.evaluate()
    assert trainer.evaluate()["hf"] == wanted["hf"]
    trainer.exact.num_process, trainer.exact.add_batch = 2, lambda **kwargs: None
    with pytest.raises(ValueError, match="must be an object of `evaluate` with `num_process=1`, but has 2"):
        trainer.evaluate()
    trainer.exact = evaluate_package.combine([worker.Exact(cache_dir=str(tmp_path)) for _ in range(2)])
    with pytest.raises(TypeError, match="keeps its examples in several objects of `evaluate`"):
        trainer.evaluate()


def test_a_prediction_calls_the_model_by_default() -> None:
    """With keywords, the first of several tensors, or the batch; `Trainer` takes functions for both ends."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)[:, 0]

    x = torch.arange(15.0).reshape(5, 3)
    model = Two()
    given: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": data(),
        "forward": lambda model, batch: (model(batch[0]).mean(), {}),
        "max_steps": 1,
    }
    for batches in ([{"x": x[:2]}, {"x": x[2:]}], [(x[:2], x[:2]), (x[2:], x[2:])], [x[:2], x[2:]]):
        assert torch.equal(Trainer(**given).predict(batches), model(x).detach())
    functions = {
        "predict_forward": lambda model, batch: model(batch[0]) + 1,
        "finish_evaluation": lambda metrics: {"double": 2 * metrics["loss"]},
    }
    trainer = Trainer(**given, **functions)
    assert torch.equal(trainer.predict([(x,)]), model(x).detach() + 1)
    assert trainer.evaluate([(x,)]) == {"double": 2 * model(x).mean().item()}


@pytest.mark.parametrize("form", FORMS)
def test_the_state_of_hooks_comes_back_sharded_and_by_rank(ranks: dict[str, Any], form: str) -> None:
    """DTensors inside lists and dicts come back with their values, and sharded where the model is. What differs from
    rank to rank comes back by rank; at another number of processes every rank gets that of rank 0.
    """
    names = [name for name in FORMS if FORMS.index(name) <= FORMS.index(form)]
    for rank, own in enumerate(ranks[form]):
        assert own["hooks"]["loaded"].keys() == set(names)
        assert own["hooks"]["loaded"][form] == own["hooks"]["saved"], rank
        for name in names:
            is_same_size = NUM_PROCESSES[name] == NUM_PROCESSES[form]
            saved = ranks[name][rank if is_same_size else 0]["hooks"]["saved"]
            loaded = own["hooks"]["loaded"][name]
            assert values_of(loaded) == values_of(saved), name
            assert loaded["mine"]["rank"] == (rank if is_same_size else 0), name
    if form == "fsdp2":
        saved = ranks[form][0]["hooks"]["saved"]
        assert saved["nested"]["list"][0]["0.weight"][1]
        assert saved["flat"]["odd"][1]
        hook = worker.Stateful()
        path = ranks["folder"] / "hooks_fsdp2" / "step_0000001"
        worker.make(hook, CheckpointingHook(1, path=ranks["folder"] / "unused" / "one", load=path), max_steps=1).train()
        found = json.loads(json.dumps(worker.form_of(hook.loaded)))
        assert values_of(found) == values_of(saved)
        assert not found["nested"]["list"][0]["0.weight"][1]


def values_of(nested: Any) -> Any:
    """What `form_of` gave, without whether it is sharded."""
    if isinstance(nested, list) and len(nested) == 2 and isinstance(nested[1], bool):
        return nested[0]
    if isinstance(nested, dict):
        return {key: values_of(value) for key, value in nested.items()}
    return [values_of(value) for value in nested] if isinstance(nested, list) else nested
