"""`trainloop plot` draws the curves of runs, with their restarts, checkpoints and retries."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainloop import BaseHook, CheckpointingHook, LoggingHook, MetricsFileHook
from trainloop.__main__ import main
from trainloop.commands.curves import choose_panels, read_runs
from trainloop.commands.pictures import MAX_POINTS, thinned

from .small import SmallTrainer

pytest.importorskip("matplotlib")
RETRIED, FAILS_AT, LAST_STEP = 4, 8, 12


class Log(BaseHook):
    def on_after_step(self, trainer: Any) -> None:
        if trainer.step % 3 == 0:
            trainer.log({"val": {"loss": 1 / trainer.step, "accuracy": 0.5}, "<b>": {"&": 1}})


def life(workspace: Path, fails_at: int) -> None:
    def forward(self: Any, batch: Any) -> Any:
        if self.step == fails_at:
            raise RuntimeError("as told")
        loss = self.model(batch[0]).pow(2).mean()
        is_bad = self.step == RETRIED and not self.step_info.non_finite_grad_retry_count
        return loss * (math.nan if is_bad else 1), {}

    hooks = [LoggingHook(1), MetricsFileHook(), Log(), CheckpointingHook(5)]
    SmallTrainer(LAST_STEP, workspace=workspace, hooks_=lambda self: hooks, forward_=forward).train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workspaces; the run in "a" fails once and is resumed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(RuntimeError, match="as told"):
        life(folder / "a", FAILS_AT)
    life(folder / "a", 0)
    life(folder / "b", 0)
    return folder


def test_the_marks_are_those_of_the_account(runs: Path) -> None:
    """Where the run went on, which steps were retried, and which were saved."""
    a, b = read_runs([runs / "a", runs / "b"])
    assert (a.name, a.restarts, a.retries, a.checkpoints) == ("a", [5], [RETRIED], [5, 10, 12])
    assert (b.name, b.restarts, b.retries, b.checkpoints) == ("b", [], [RETRIED], [5, 10, 12])
    assert a.curves["train/loss"] == b.curves["train/loss"]
    assert a.curves["train/loss"][0] == list(range(1, LAST_STEP + 1))


def test_the_panels_are_those_that_one_looks_for(runs: Path) -> None:
    """Losses over each other, then validation, gradient norm, learning rate and speed; or those that are named."""
    both = read_runs([runs / "a", runs / "b"])
    panels, left_out = choose_panels(both, [])
    assert [(panel.title, panel.names) for panel in panels] == [
        ("loss", ("train/loss", "val/loss")),
        ("val/accuracy", ("val/accuracy",)),
        ("<b>/&", ("<b>/&",)),
        ("gradient norm", ("train/grad_norm",)),
        ("learning rate", ("train/lr/0",)),
        ("seconds per step", ("train/step_time",)),
    ]
    assert left_out == ["train/data_time", "train/non_finite_grad_retry_count"]
    panels, _ = choose_panels(both, ["val/*", "train/data_time"])
    assert [panel.names for panel in panels] == [("val/loss", "val/accuracy"), ("train/data_time",)]


def test_a_picture_and_a_page_are_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The background is that of the theme; the page needs no other file and takes the reader's colours."""
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(runs / "a")]) == 0
    assert main(["plot", str(runs / "a"), str(runs / "b"), "--dark", "--metric", "val/*", "--out", "dark.png"]) == 0
    assert main(["plot", str(runs / "a"), str(runs / "b"), "--html"]) == 0
    told = capsys.readouterr().out
    assert "Wrote plot.png." in told
    assert "Not drawn; --metric NAME draws them: train/data_time, train/non_finite" in told
    with Image.open("plot.png") as light, Image.open("dark.png") as dark:
        corners = [image.convert("RGB").getpixel((0, 0)) for image in (light, dark)]
    assert corners == [(255, 255, 255), (13, 17, 23)]
    page = Path("plot.html").read_text()
    assert page.count("<svg") == 6
    assert not re.findall(r'(?:src|href)="(?!#)', page), "nothing is loaded from elsewhere"
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"(?:fill|stroke): #(?!000000)", page), "every colour is a variable"
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    for cell in ("<td>12</td>", "<td>2</td>"):
        assert cell in page


def test_what_is_wrong_is_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A workspace without metrics, with what to add; a metric that is not there; a file of another kind."""
    for arguments, message in [
        ([str(tmp_path)], f"{tmp_path} has no metrics. Return `MetricsFileHook()` from `build_hooks`"),
        ([str(runs / "a"), "--metric", "val/los"], "--metric val/los fits no metric. There are: <b>/&, train/"),
        ([str(runs / "a"), "--out", "x.gif"], "--out must be a file that ends in .png or .svg or .pdf or .html"),
        ([str(runs / "a"), "--out", "x.png", "--html"], "--out must be a file that ends in .html, but is x.png"),
    ]:
        assert main(["plot", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_long_curves_keep_their_spikes() -> None:
    """Few points are left, the highest and the lowest among them, in order."""
    values = [0.0] * 100_000
    values[54_321], values[54_400], values[7] = 9.0, -9.0, math.nan
    xs, ys = thinned(range(100_000), values)
    assert len(xs) <= MAX_POINTS + 2
    assert (max(ys), min(ys)) == (9.0, -9.0)
    assert xs == sorted(xs)
    assert xs[ys.index(9.0)] == 54_321
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])
