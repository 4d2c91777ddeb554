"""`dry_run=True` touches nothing and shows that all works; `overfit_batches` repeats the first batches."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainloop import (
    BaseHook,
    CheckpointingHook,
    DataReplayWarning,
    EvaluationHook,
    ImageFileLoggerHook,
    LoggingHook,
    MetricsFileHook,
    TrackerHook,
    Trainer,
)
from trainloop.account.metrics import read_metrics
from trainloop.checkpoint import BestK
from trainloop.data import per_rank

from .launching import REPOSITORY, launch
from .small import SmallTrainer
from .workers.rehearsal import Numbers, overfit


class Evaluated(SmallTrainer):
    def build_eval_data_loader(self) -> Any:
        return self.build_data_loader()


class Workspace(BaseHook):
    """Writes a file at each step, and notes what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.workspace: Path | None = None

    def on_after_step(self, trainer: Any) -> None:
        self.workspace = trainer.workspace
        (trainer.workspace / "own.txt").write_text("x")
        trainer.log_images({"x": torch.zeros(2, 2)})

    def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
        self.told.append((trainer.step, sorted(records), dry_run))


def tree(folder: Path) -> dict[str, int]:
    """All names, and when each file was written."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns if path.is_file() else 0 for path in paths}


def test_a_dry_run_shows_that_all_works_and_touches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every hook hears each of its occasions once, at the third step. Checkpoints of the workspace are not looked at.
    An absolute folder is not written to, trackers are not started, and the scratch folder is removed.
    """
    workspace, elsewhere = tmp_path / "runs" / "one", tmp_path / "elsewhere"
    SmallTrainer(2, workspace=workspace, hooks_=lambda self: [CheckpointingHook(1)]).train()
    elsewhere.mkdir()
    before = tree(tmp_path)
    watching = Workspace()
    hooks = [
        LoggingHook(100),
        EvaluationHook(100, at_start=True, at_end=False),
        TrackerHook("tensorboard"),
        MetricsFileHook(),
        ImageFileLoggerHook(path=elsewhere / "images"),
        CheckpointingHook(100, path=elsewhere / "saved", keep=[BestK("val/loss")]),
        CheckpointingHook("epoch"),
        watching,
    ]
    trainer = Evaluated(1000, workspace=workspace, hooks_=lambda self: hooks, dry_run=True)
    with caplog.at_level("INFO", "trainloop"):
        trainer.train()
        trainer.train()  # only says that it is over
    assert tree(tmp_path) == before
    assert trainer.step == 3
    assert watching.told == [(3, ["train"], True), (3, ["val"], True)]
    assert watching.workspace is not None
    assert not watching.workspace.exists()
    assert trainer.workspace == workspace
    text = caplog.text
    assert "Dry run: steps 1 to 3 took" in text
    assert len(re.findall(r"Dry run: saved .*, loaded it in .* s, and got the same values\.", text)) == 2
    assert re.search(r"Dry run: peak memory: .* of a process \(rank 0\)\.", text)
    assert "Would log to tensorboard at step 3: {'train/" in text
    assert "Dry run: everything works. The workspace was not touched." in text
    assert "finds no metric of that name" not in text
    assert text.rstrip().endswith("The dry run is over. Set `dry_run=False` to train.")


def test_a_dry_run_that_fails_leaves_nothing_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It raises what the run would, here in the evaluation that no hook makes, and the workspace is not even made."""

    class Broken(Evaluated):
        def eval_forward(self, batch: Any) -> Any:
            raise RuntimeError("as told")

    hooks = [CheckpointingHook(100)]
    with pytest.raises(RuntimeError, match="as told"):
        Broken(9, workspace=tmp_path / "a" / "b", hooks_=lambda self: hooks, dry_run=True).train()
    assert tree(tmp_path) == {}
    assert Evaluated(9, dry_run=True).workspace is None
    with caplog.at_level("INFO", "trainloop"):
        Evaluated(9, dry_run=True).train()
    assert "Dry run: the evaluation found loss 0." in caplog.text


def test_what_is_loaded_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that does not come back is an error."""
    from trainloop import rehearsal

    def spoilt(trainer: Any, *args: Any) -> Any:
        state = resume(trainer, *args)
        with torch.no_grad():
            trainer.model.weight += 1
        return state

    resume = rehearsal.resume
    monkeypatch.setattr(rehearsal, "resume", spoilt)
    hooks = [CheckpointingHook(100)]
    with pytest.raises(RuntimeError, match=r"loaded other values than it had saved, of 1 tensors \(first: weight\)"):
        SmallTrainer(9, workspace=tmp_path, hooks_=lambda self: hooks, dry_run=True).train()


# ---------------------------------------------------------------------- overfit_batches


def first_batches(num: int) -> list[list[float]]:
    """What a run without the option draws first."""
    from .workers.rehearsal import Seen, loader

    seen = Seen()
    SmallTrainer(num, data_loader=loader, forward_=seen.forward).train()
    return seen.samples


def test_the_first_batches_are_repeated_in_their_order(tmp_path: Path) -> None:
    """Those that the run would have drawn first, shuffled; also after a resume in the middle of them."""
    wanted = first_batches(4)
    assert overfit(tmp_path, 6) == wanted + wanted[:2]
    assert overfit(tmp_path, 11) == wanted[2:] + wanted[:3]


@pytest.mark.parametrize("kind", ["stream", "list", "per_rank", "without_length", "few"])
def test_any_data_is_repeated(tmp_path: Path, kind: str) -> None:
    """Also data without an index, which is kept in memory, and data that has fewer batches."""
    numbers = [torch.arange(3.0) + 3 * i for i in range(10)]
    wanted = [batch.tolist() for batch in numbers[:4]]

    class Endless(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Any:
            yield from range(12)
            raise AssertionError("was asked for more")

    data: dict[str, Any] = {
        "stream": lambda self: (batch for batch in numbers),
        "list": lambda self: numbers,
        "per_rank": lambda self: per_rank(numbers),
        "without_length": lambda self: DataLoader(Numbers(), batch_size=3, sampler=Endless()),
        "few": lambda self: numbers[:2],
    }
    if kind == "few":
        wanted = wanted[:2] * 2
    assert overfit(tmp_path, 6, data[kind]) == (wanted + wanted)[:6]
    replays = kind == "per_rank"  # as `per_rank` does of a list
    with pytest.warns(DataReplayWarning) if replays else nullcontext():
        assert overfit(tmp_path, 9, data[kind]) == (wanted + wanted + wanted)[6:9]


def test_an_epoch_is_the_kept_batches(tmp_path: Path) -> None:
    """Epochs, and batches that are changed in place."""
    trainer = SmallTrainer(None, max_epochs=3, overfit_batches=2)  # type: ignore[arg-type]
    trainer.train()
    assert (trainer.step, trainer.steps_per_epoch) == (6, 2)

    def spoil(model: Any, batch: Any) -> Any:
        loss = model(batch.clone()).pow(2).mean()
        seen.append(float(batch.sum()))
        batch.zero_()
        return loss, {}

    seen: list[float] = []
    model = torch.nn.Linear(3, 1)
    data = (torch.ones(2, 3) for _ in range(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(
        model=model, optimizer=optimizer, data_loader=data, forward=spoil, max_steps=3, overfit_batches=1, seed=0
    ).train()
    assert seen == [6.0] * 3


def test_wrong_arguments_are_told() -> None:
    """By name, and with the remedy."""
    with pytest.raises(ValueError, match="`overfit_batches` must be at least 1, but is 0"):
        SmallTrainer(1, overfit_batches=0)
    with pytest.raises(TypeError, match=re.escape("`dry_run` must be True or False, but is 1 (int)")):
        SmallTrainer(1, dry_run=1)
    with pytest.raises(ValueError, match="`overfit_batches` needs a `seed` if the data has no index"):
        SmallTrainer(1, overfit_batches=1, seed=None, data_loader=lambda self: iter([torch.zeros(1, 3)])).train()


def test_two_ranks(tmp_path: Path) -> None:
    """Both take part in the dry run; they share the samples of the kept batches, each once an epoch, also after a
    resume; rank 0 alone writes the metrics, and each rank its profile.
    """
    launch(REPOSITORY / "tests" / "workers" / "rehearsal.py", "ddp2", str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [found["dry"] for found in ranks] == [3, 3]
    assert not (tmp_path / "dry").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".dry-run")] == []
    steps = [a + b for a, b in zip(*([*found["first"], *found["then"]] for found in ranks), strict=True)]
    assert len(steps) == 8
    kept = Counter(sample for batch in first_batches(4) for sample in batch)
    for start in range(0, 8, 2):  # an epoch of 12 samples is two steps of two ranks
        assert Counter(steps[start] + steps[start + 1]) == kept
    assert steps[:2] * 4 == steps
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))
    profiles = sorted(path.name for path in (tmp_path / "run" / "profiles" / "step_0000002").iterdir())
    assert profiles == [f"rank_0000{rank}.{end}" for rank in (0, 1) for end in ("trace.json.gz", "txt")]
