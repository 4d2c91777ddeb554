"""What a person sees in a terminal: whole lines, and below them one bar."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainloop.terminal import Bar

from .launching import REPOSITORY, command, environment
from .screens import Meetings, Terminal

WORKER = REPOSITORY / "tests" / "workers" / "terminal.py"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) \[RANK 0\] ")


def checked_bar(terminal: Terminal) -> str:
    """The only bar on the screen. Nothing else is in its row, nothing is below it, and above it is an empty row."""
    rows = terminal.rows()
    (bar,) = terminal.bars()
    assert sum("━" in row or "─" in row for row in rows) <= 1, rows
    assert rows[-1] == bar, rows
    assert rows[-2] == "", rows
    return bar


def plain(line: str) -> str:
    """A line without what differs from run to run: numbers and the temporary folder."""
    return re.sub(r"\d[\d.e:-]*", "#", re.sub(r"(/[\w.-]+)+/", "/", line))


def test_lines_and_the_bar_at_80_columns_until_ctrl_c(tmp_path: Path) -> None:
    """An evaluation, warnings, other libraries and half a line leave whole lines and one bar. So does Ctrl-C."""
    meetings = Meetings(tmp_path)
    with Terminal([sys.executable, str(WORKER), str(tmp_path), "signal"], 80, 20, environment()) as run:
        run.wait_for(lambda: meetings.has_come("training"))
        assert checked_bar(run).startswith("training ")
        meetings.go("training")
        run.wait_for(lambda: meetings.has_come("evaluation"))
        assert re.match(r"evaluation 2/12 ━+─+ .*batches/s|evaluation 2/12 ━+─+ .*s/batch", checked_bar(run))
        meetings.go("evaluation")
        run.wait_for(lambda: meetings.has_come("warning"))
        assert checked_bar(run).startswith("evaluation 3/12 ")
        assert run.lines()[-2].endswith("UserWarning: a warning in the evaluation")
        meetings.go("warning")
        run.wait_for(lambda: meetings.has_come("half"))
        assert run.bars() == []
        assert run.rows()[-1] == "half"
        meetings.go("half")
        run.wait_for(lambda: meetings.has_come("lines"))
        bar = checked_bar(run)
        assert re.match(r"training 6/1000 [━─]+ [\d.]+ s(teps/s|/step) \| ETA [\d:]+ \| loss [\d.]+$", bar), bar
        meetings.go("lines")
        run.wait_for(lambda: meetings.has_come("end"))
        run.type("\x03")
        run.wait_for(lambda: any("Ctrl-C again" in bar for bar in run.bars()))
        checked_bar(run)
        meetings.go("end")

        assert run.wait() == 130
        assert run.bars() == []
        progress = "step time # s | data time # s | ETA # | loss # | grad norm # | lr #"
        lines = [plain(line) for line in run.lines()]
        first = next(i for i, line in enumerate(lines) if "No checkpoint" in line)
        assert lines[first:] == [
            "# INFO [RANK #] No checkpoint is loaded from /checkpoints. The run starts at step #",
            f"# INFO [RANK #] step #/# | {progress}",
            "/terminal.py:# UserWarning: a warning in the evaluation",
            '  warnings.warn("a warning in the evaluation", stacklevel=#)',
            "# INFO [RANK #] step #/# | val: loss #",
            "a line of another library",
            "a line of the script",
            "half a line",
            "a line of a library in C++",
            f"# INFO [RANK #] step #/# | {progress}",
            "# INFO [RANK #] step #/# | val: loss #",
            "# WARNING [RANK #] Ctrl-C: saved after step # in /checkpoints, exiting with code # Start the same command"
            " again to continue.",
        ]


def test_lines_and_the_bar_of_two_ranks_at_140_columns_until_sigterm(tmp_path: Path) -> None:
    """Under `accelerate launch`, with a warning of rank 1 and a window that gets narrower; SIGTERM leaves no bar."""
    meetings = Meetings(tmp_path)
    with Terminal(command(WORKER, "ddp2", [str(tmp_path), "signal"]), 140, 30, environment()) as run:
        for name in ("training", "evaluation", "warning", "half", "lines", "end"):
            run.wait_for(lambda name=name: meetings.has_come(name))
            if name == "evaluation":
                assert len(checked_bar(run)) < 140
                run.resize(100, 30)
            elif name not in ("half", "end"):
                assert len(checked_bar(run)) < 140
            if name == "end":
                os.kill(int((tmp_path / "pid.0").read_text()), signal.SIGTERM)
            meetings.go(name)
        assert run.wait() != 0
        assert run.bars() == []
        lines = run.lines()
        assert not any("━" in line or "─" in line for line in lines)
        for told in (
            "step 4/1000 | step time",
            "step 8/1000 | step time",
            "SIGTERM was received: saved after step 10 in",
        ):
            (line,) = [line for line in lines if told in line and "RANK 0" in line]
            assert LOG_LINE.match(line), line
        assert sum(line.endswith("UserWarning: a warning of rank 1") and line.startswith("/") for line in lines) == 1


def test_a_file_gets_whole_lines_and_no_control_codes(tmp_path: Path) -> None:
    """Also of an evaluation that takes long, and of a crash."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), "crash"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "\x1b" not in done.stderr + done.stdout
    assert "\r" not in done.stderr + done.stdout
    steps = [match[1] for line in done.stderr.splitlines() if (match := re.search(r"\] step (\d+)/11 \| step", line))]
    assert steps == ["4", "8"]
    assert done.stderr.endswith("RuntimeError: a crash under the bar\n")
    assert done.stdout == "a line of the script\nhalf a line\n"


@pytest.mark.parametrize("columns", [10, 40, 80, 140])
def test_a_bar_fits_into_its_terminal(columns: int) -> None:
    """However narrow, also without a total; the numbers come before the meter."""
    bar, endless = Bar("training", 100, "step", done=1), Bar("training", None, "step", done=1)
    for one in (bar, endless):
        one.update(49)
        one.note = "loss 0.1"
        line = one.line(columns)
        assert len(line) < columns
        assert line.startswith("training 50"[: columns - 2])
    assert ("━" in bar.line(columns)) == (columns >= 80)
    assert "━" not in endless.line(columns)
    assert bar.line(columns, "#-").isascii() or columns < 80


@pytest.mark.parametrize("example", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_help_of_an_example_shows_each_default(example: Path) -> None:
    """Each option with a default has a help text, and either it or the parser's formatter shows the default."""
    calls = [node for node in ast.walk(ast.parse(example.read_text())) if isinstance(node, ast.Call)]
    shows_all = "ArgumentDefaultsHelpFormatter" in example.read_text()
    for call in (call for call in calls if getattr(call.func, "attr", "") == "add_argument"):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if "default" in keywords:
            assert "help" in keywords, ast.unparse(call)
            assert shows_all or "%(default)s" in keywords["help"], ast.unparse(call)


def test_a_sample_of_the_language_model_has_no_control_characters() -> None:
    """They are written as codes; lines stay lines."""
    from examples.language_model import printable

    assert printable("a\n\x1b[31mb\r\x07é\ufffd\u2028") == "a\n\\x1b[31mb\\r\\x07é\ufffd\\u2028"
