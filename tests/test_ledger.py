"""The ledger of a run: after a resume the steps that are done again are compared with what they were."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainloop import CheckpointingHook
from trainloop.account import read_events
from trainloop.account.audit import QUANTITIES, Audit, Expected
from trainloop.account.ledger import Ledger, LedgerLife, StepBits, read_ledger
from trainloop.checkpoint import CheckpointStore
from trainloop.testing.kills import KillAt
from trainloop.testing.lives import launch_environment, live, path_prefix, read_notes

from .launching import FSDP2
from .small import SmallTrainer
from .workers.account import Regression, indices

KILL = KillAt(27, "on_after_step")
"""Steps 21 to 25 at least are in the ledger then, with their losses; the newest checkpoint is of step 20."""
CHANGED = 7


def log_of(workspace: Path, life: int) -> str:
    return Path(f"{path_prefix(workspace, life, 0)}.log").read_text()


def audits(workspace: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(workspace) if event["event"] == "audit"]


@pytest.mark.parametrize(("form", "num_processes"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_resume_tells_whether_its_steps_have_the_same_bits(tmp_path: Path, form: str, num_processes: int) -> None:
    """A run that was killed says that it does the same again; if a sample was changed meanwhile, it names the first
    step that has it, the rank that read it, and the loss.
    """
    run = tmp_path / "run"
    env = launch_environment(num_processes, FSDP2 if form == "fsdp" else ())
    start = partial(live, num_processes=num_processes, env=env, record=indices)
    start(Regression, run, KILL)
    start(Regression, run, KillAt(29, "on_after_step"))  # rank 1 may have recorded step 28 in its first life
    assert (found := re.search(r"Steps 21 to (\d+) were repeated with the same bits", log_of(run, 2)))
    assert int(found[1]) >= 25
    start(partial(Regression, changed=CHANGED), run)
    same, other = audits(run)
    assert (same["same"], same["first"], same["last"]) == (True, 21, int(found[1]))
    noted = [
        (row["step"], rank)
        for rank in range(num_processes)
        for row in read_notes(path_prefix(run, 3, rank))
        if CHANGED in [index for batch in row.get("recorded", ()) for index in batch[2]]
    ]
    step, rank = min(noted)
    assert (other["same"], other["step"], other["rank"], other["quantity"]) == (False, step, rank, "loss")
    assert f"The first difference is in step {step}, rank {rank}: the loss: " in log_of(run, 3)
    assert log_of(run, 3).count("repeated") == 1
    newest = CheckpointStore(run / "checkpoints").resolve(30)
    assert newest is not None
    assert newest.manifest.settings["audit/differences"] == 1
    assert newest.manifest.settings["audit/steps_done_again"] >= 10


def test_what_was_changed_on_purpose_is_named(tmp_path: Path) -> None:
    """Another learning rate, other batches and another number of processes are told for what they are."""
    runs = [tmp_path / name for name in ("rate", "batch", "ranks", "off")]
    rate, batch, ranks, off = runs
    for run in (rate, batch, ranks):
        live(Regression, run, KILL)
    live(partial(Regression, lr=2e-2), rate)
    live(partial(Regression, batch_size=5), batch)
    live(partial(Regression, batch_size=2), ranks, num_processes=2)
    assert [(a["same"], a["step"], a["quantity"]) for a in audits(rate)] == [(False, 21, "learning rates")]
    assert "Also changed since then: optimizer/0/lr (0.01 → 0.02)" in log_of(rate, 2)
    assert [(a["same"], a["step"], a["quantity"]) for a in audits(batch)] == [(False, 21, "position in the data")]
    assert "batch_size (4 → 5)" in log_of(batch, 2)
    (audit,) = audits(ranks)
    assert (audit["same"], audit["first"]) == (True, 21)
    assert re.search(r"repeated by 2 processes instead of 1: same positions .* differ by at most", log_of(ranks, 2))
    live(partial(Regression, ledger=False, max_steps=11), off)
    assert not (off / "ledger").exists()


def test_a_torn_ledger_is_read_up_to_its_tear(tmp_path: Path) -> None:
    """A record that is cut off or damaged is passed over, and the next life begins a whole one behind it."""
    ledger = Ledger(tmp_path, 0)
    ledger.open(1, 1, 1, 0)
    for step in range(1, 20):
        ledger.add_step(step, step / 3, step, 7)
        ledger.add_loss(step, -step / 7)
    ledger.close()
    raw = bytearray(ledger.path.read_bytes())
    raw[32 * 5 + 9] ^= 1
    ledger.path.write_bytes(raw[:-5])
    again = Ledger(tmp_path, 0)
    again.open(2, 1, 1, 10)
    again.add_step(11, 0.5, 11, 7)
    again.close()
    first, second = read_ledger(tmp_path, 0)
    assert sorted(first.steps) == [1, 2, *range(4, 20)]
    assert first.steps[19] == StepBits(19 / 3, 19, 7)
    assert sorted(first.losses) == list(range(1, 19))
    assert (second.number, second.start_step, second.steps) == (2, 10, {11: StepBits(0.5, 11, 7)})
    assert again.last_word()[1] == 11
    assert ledger.path.stat().st_size % 32 == 0


def test_the_ledger_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long run the newest records stay, in two files at most, and they are still of one life."""
    monkeypatch.setattr("trainloop.account.ledger._MAX_FILE_BYTES", 32 * 100)
    ledger = Ledger(tmp_path, 3)
    ledger.open(1, 1, 1, 0)
    for step in range(1, 1001):
        ledger.add_step(step, 1.0, step, 0)
    ledger.close()
    (life,) = read_ledger(tmp_path, 3)
    assert list(life.steps) == list(range(min(life.steps), 1001))
    assert len(life.steps) >= 100
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 32 * 230
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_goes_on_without_its_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be written ends no run; it is told once."""
    (tmp_path / "ledger").write_text("in the way")
    trainer = SmallTrainer(6, workspace=tmp_path, hooks_=lambda self: [CheckpointingHook(interval=2)])
    trainer.train()
    assert trainer.step == 6
    assert sum("ledger can no longer be written" in record.getMessage() for record in caplog.records) == 1


def test_a_file_that_fills_up_ends_only_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of the run does the same."""
    real = os.write

    def full(file: int, raw: bytes) -> int:
        if len(raw) % 32 == 0 and len(raw) > 32:
            raise OSError(28, "No space left on device")
        return real(file, raw)

    monkeypatch.setattr("trainloop.account.ledger.os.write", full)
    trainer = SmallTrainer(20, workspace=tmp_path, hooks_=lambda self: [CheckpointingHook(interval=50)])
    trainer.train()
    assert trainer.step == 20


def life(number: int, steps: dict[int, StepBits], start: int = 0, **kwargs: Any) -> LedgerLife:
    return LedgerLife(number, 1, kwargs.pop("world_size", 1), start, steps, **kwargs)


def test_what_is_expected_comes_from_the_newest_way_of_the_run() -> None:
    """Later lives win, and once one has gone another way, what an older one did beyond is not expected any more."""
    old = life(1, {step: StepBits(float(step), step, 0) for step in range(1, 18)}, losses={15: 1.0})
    same = life(2, {11: StepBits(11.0, 11, 0), 12: StepBits(12.0, 12, 0)}, 10)
    assert sorted(Expected.of([old, same], 10).steps) == list(range(11, 18))
    other = life(3, {11: StepBits(11.5, 11, 0)}, 10)
    expected = Expected.of([old, same, other], 10)
    assert expected.steps == {11: StepBits(11.5, 11, 0)}
    assert expected.losses == {}


@pytest.mark.parametrize(
    ("now", "quantity"),
    [
        (StepBits(1.0, 2, 4), "position in the data"),
        (StepBits(1.5, 1, 4), "learning rates"),
        (StepBits(1.5, 1, 3), "gradient norm"),
        (StepBits(-0.0, 1, 3), "gradient norm"),
        (StepBits(1.0, 1, 3), None),
    ],
)
def test_the_quantity_nearest_to_the_cause_is_told(now: StepBits, quantity: str | None) -> None:
    """A learning rate that differs makes the norm differ, so it is the one that is told; a zero has a sign."""
    was = StepBits(0.0 if now.norm == 0 else 1.0, 1, 3)
    audit = Audit(Expected({5: was}, {5: 2.0}), rank=0, world_size=1)
    audit.step(5, now)
    audit.loss(5, 2.0)
    found = audit.result().difference
    assert (found.quantity if found else None) == quantity
    assert QUANTITIES[-1] == "gradient norm"
