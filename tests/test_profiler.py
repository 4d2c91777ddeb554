"""ProfilerHook records the steps it was told to, changes nothing, and says what filled the memory."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainloop import ProfilerHook

from .small import SmallTrainer


def trained(workspace: Path | None, *hooks: Any, steps: int = 10, **given: Any) -> SmallTrainer:
    def model(self: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    trainer = SmallTrainer(steps, workspace=workspace, hooks_=lambda self: list(hooks), **{"model_": model, **given})
    trainer.train()
    return trainer


def files(workspace: Path) -> list[str]:
    return sorted(str(path.relative_to(workspace)) for path in workspace.rglob("*") if path.is_file())


def test_the_steps_of_each_cycle_are_recorded_and_nothing_changes(tmp_path: Path) -> None:
    """A trace and a table a cycle; weights as without the hook, bit for bit, dropout included. A run that ends in a
    cycle writes what it has.
    """
    plain = trained(None)
    hook = ProfilerHook(1, 1, 2, 0, 1, activities=["cpu"], record_shapes=True)  # 3 - 5, 7 - 9, and a part from 11 on
    watched = trained(tmp_path, hook)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name])
    names = ("rank_00000.trace.json.gz", "rank_00000.txt")
    assert files(tmp_path) == [f"profiles/step_000000{step}/{name}" for step in (5, 9) for name in names]
    for step in (5, 9):
        folder = tmp_path / "profiles" / f"step_000000{step}"
        events = json.loads(gzip.decompress((folder / names[0]).read_bytes()))["traceEvents"]
        steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
        assert steps == {"ProfilerStep#1", "ProfilerStep#2"}
        assert "aten::addmm" in {event.get("name") for event in events}
        assert re.search(r"aten::addmm.*\[\[8\], \[2, 3\], \[3, 8\]", (folder / names[1]).read_text())
    watched.max_steps = 14
    watched.train()  # counted anew: 13 warms up, and 14 is recorded
    assert files(tmp_path / "profiles" / "step_0000014") == sorted(names)


class Batches(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.ones(3), "ids": [index, index + 1], "name": "abc"}


def test_when_memory_runs_out_a_report_says_what_filled_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The step, the batch's shapes, the largest tensors with their names; also if another error has taken its place,
    and in the middle of a cycle.
    """
    held: list[torch.Tensor] = []

    def forward(self: Any, batch: Any) -> Any:
        if self.step == 3:
            held.append(torch.zeros(4000, 777))
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            except torch.OutOfMemoryError as ex:
                raise RuntimeError("the user's own words") from ex
        return self.model(batch["x"]).pow(2).mean(), {}

    with pytest.raises(RuntimeError, match="the user's own words"):
        trained(
            tmp_path,
            ProfilerHook(wait=1, warmup=1, active=5),
            data_loader=lambda self: DataLoader(Batches(), batch_size=4),
            model_=lambda self: nn.Sequential(nn.Linear(3, 600_000), nn.Linear(600_000, 1)),
            optimizer_=lambda self: torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9),
            forward_=forward,
        )
    assert files(tmp_path) == ["profiles/out_of_memory_step_0000003_rank_00000.txt"]
    report = (tmp_path / files(tmp_path)[0]).read_text()
    assert report.startswith(
        "Memory ran out in step 3, on rank 0 (cpu): CUDA out of memory. Tried to allocate 2.00 GiB.\nRaised at "
    )
    for text in (
        "test_profiler.py",
        "batch['x']: 4 x 3, float32",
        "batch['ids'][1]: 4, int64",
        "batch['name'][0]: str",
        "4000 x 777, float32",
        "600000 x 3, float32  0.weight",
        "600000 x 3, float32  optimizer: momentum_buffer of 0.weight",
    ):
        assert text in report, report
    lines = report[report.index("The largest tensors") :].splitlines()[1:]
    sizes = [float(line.split()[0]) for line in lines if " MiB " in line]
    assert sizes == sorted(sizes, reverse=True), lines
    assert len(sizes) > 1
    assert "The whole report is" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"wait": -1}, "`wait` must be at least 0, but is -1."),
        ({"active": 0}, "`active` must be at least 1, but is 0."),
        ({"repeat": 1.5}, "`repeat` must be an integer, but is 1.5 (float)."),
        ({"activities": "cpu"}, "`activities` must be a list of names or None, but is 'cpu' (str)."),
        (
            {"activities": ["gpu"]},
            "`activities` must be names out of ('cpu', 'cuda', 'xpu', 'mtia', 'hpu'), but one is",
        ),
        ({"activities": []}, "but there are none."),
        ({"with_stack": 1}, "`with_stack` must be True or False, but is 1 (int)."),
        ({"path": 3}, "`path` must be a path, but is 3 (int)."),
    ],
)
def test_nonsense_is_refused_at_construction(kwargs: Any, message: str) -> None:
    """By name."""
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ProfilerHook(**kwargs)


def test_two_profilers_and_a_missing_workspace_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before the first step. Without CUDA, a memory history is told to be none."""
    with pytest.raises(ValueError, match="that both profile the run"):
        trained(tmp_path, ProfilerHook(), ProfilerHook())
    with pytest.raises(ValueError, match="ProfilerHook writes to `workspace`, but it is None"):
        trained(None, ProfilerHook())
    trainer = trained(tmp_path, hook := ProfilerHook(memory_history=True), steps=1)
    assert "records no memory history: the run is on cpu" in caplog.text
    assert hook.write_memory_snapshot(trainer, tmp_path / "x.pickle") is False
