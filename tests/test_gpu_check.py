"""`python -m benchmarks.gpu_check`: a report whatever fails, hangs or is missing; and what it reads from a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.gaps import Gap, device_busy, gaps, host_waits

from .launching import REPOSITORY, environment

FAULTY = """
import time
import pytest

def test_passes(record_property):
    record_property("a measurement", 17)

def test_fails():
    assert 1 + 1 == 3, "a failure that was put here"

def test_is_skipped():
    pytest.skip("for this reason")

def test_hangs():
    print("it hangs", flush=True)
    time.sleep(600)
"""


def check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), *arguments]
    return subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {test["test"].split("::")[-1]: test["outcome"] for test in report["tests"]}


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    folder = tmp_path / "faulty"
    folder.mkdir()
    (folder / "test_faulty.py").write_text(FAULTY)
    return folder


def test_the_report_tells_what_failed_and_what_was_skipped(faulty: Path, tmp_path: Path) -> None:
    """With its reason, in both reports and on the terminal; the exit code is 1."""
    path = faulty / "test_faulty.py"
    path.write_text(path.read_text().replace("time.sleep(600)", "pass"))
    out = tmp_path / "out"
    done = check(out, "--device", "cpu", "--only", "tests", "--tests", str(faulty))
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert outcomes(report) == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_hangs": "passed",
    }
    assert report["stages"]["tests"]["outcome"] == "exit code 1"
    for text in ((out / "report.md").read_text(), done.stdout):
        for words in ("a failure that was put here", "skipped: 1 tests: Skipped: for this reason"):
            assert words in text
        assert "| test_passes | a measurement | 17 |" in text


@pytest.mark.slow
def test_a_test_that_hangs_and_a_benchmark_without_time_still_give_a_report(faulty: Path, tmp_path: Path) -> None:
    """A dry run on the CPU: the tests are ended by their limit, the benchmark begins all the same, and the reports have
    what was found until then. No process is left.
    """
    out = tmp_path / "out"
    done = check(out, "--device", "cpu", "--budget", "200", "--tests", str(faulty))
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert outcomes(report) == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_hangs": "unfinished",
    }
    assert report["stages"]["tests"]["outcome"].startswith("ended after its limit of")
    assert report["stages"]["benchmark"]["seconds"] > 0
    assert {*report["benchmark"]["seconds"], *report["benchmark"]["problems"]} >= {"launch-bound", "GPT"}
    assert "test_hangs (unfinished)" in (out / "report.md").read_text()
    assert len(list(out.iterdir())) <= 8
    assert not [command for command in map(command_line, Path("/proc").glob("[0-9]*")) if str(faulty) in command]


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:  # it has ended
        return ""


def test_without_a_gpu_it_says_so_and_how_to_try_it(tmp_path: Path) -> None:
    """Nothing runs, and the report tells why."""
    done = check(tmp_path, "--budget", "30")
    if "torch sees no GPU" not in done.stdout:
        pytest.skip("torch sees a GPU here")
    assert done.returncode == 1
    assert "`--device cpu` makes a dry run" in (tmp_path / "report.md").read_text()


def kernel(name: str, start: float, duration: float, category: str = "kernel") -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": start, "dur": duration}


LP_NORM = "void multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float, 1>>"
ADAM = "void multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>"


def test_the_gap_between_norm_and_update_is_found_in_a_trace() -> None:
    """The time in which nothing runs on the device, of each step: what takes the total norm and brings it to the host
    is work, and the rest of the span is idle.
    """
    step = [
        kernel("gemm", 0, 100),
        kernel(LP_NORM, 100, 10),
        kernel("lpnorm_cleanup", 112, 3),
        kernel("reduce_kernel<NormTwoOps>", 120, 5),
        kernel("Memcpy DtoH (Device -> Pageable)", 126, 2, "gpu_memcpy"),
        kernel(ADAM, 178, 30),
        kernel(ADAM, 210, 30),
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 90, "dur": 40},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 80, "dur": 4},
    ]
    second = [{**event, "ts": event["ts"] + 1000} for event in step]
    events = [*reversed(second), *step]
    assert gaps(events) == [Gap(span=63.0, idle=56.0)] * 2
    assert host_waits(events) == 80
    assert device_busy(events) == 2 * (100 + 10 + 3 + 5 + 2 + 60)


def test_every_gpu_test_is_where_the_check_looks() -> None:
    """`gpu` marks stand in tests/gpu only, so that a machine with a GPU needs to collect nothing else."""
    marked = [
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "tests").rglob("*.py")
        if "pytest.mark." + "gpu" in path.read_text()
    ]
    assert marked
    assert [path for path in marked if not path.startswith("tests/gpu/")] == []
