"""Weights without a training: by step, path or metric, of a run or of another tool; bit for bit what was saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainloop import CheckpointError, CheckpointingHook, EmaHook, EvaluationHook
from trainloop.__main__ import main
from trainloop.checkpoint import BestK, Checkpoint
from trainloop.checkpoint.best import Best, parse_best

from .folders import flip
from .launching import NUM_PROCESSES, REPOSITORY, launch
from .small import SmallTrainer
from .workers import evaluating as worker

WORKER = REPOSITORY / "tests" / "workers" / "evaluating.py"
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
    for which, step, rank in (("best:val/accuracy:max", 2, "greatest"), ("best:val/loss", 2, "least")):
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
    for form in ("ddp2", "ddp3", "fsdp2"):
        options = ["--fsdp_reshard_after_forward", "false"] if "fsdp" in form else []
        launch(WORKER, form, str(folder), form, launch_args=options)
        found[form] = [json.loads((folder / f"{form}.{rank}.json").read_text()) for rank in range(NUM_PROCESSES[form])]
    return found


@pytest.mark.parametrize("form", ["ddp2", "ddp3", "fsdp2"])
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
