"""Everything that only a GPU can show, in one command: `python -m benchmarks.gpu_check --out DIR`, or `make gpu-check`.

It runs the tests marked `gpu`, then `python -m benchmarks --gpu`. It needs no make, no virtual environment and no
network: only torch, accelerate, safetensors, pytest, and this checkout. Each stage has a time limit of its own, and one
that fails or is ended doesn't stop the next. The report is written anew every few seconds, so a run that is killed has
left one.

    DIR/report.md, DIR/report.json   what was found
    DIR/*.log                        what each stage printed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
SHARE_OF_TESTS = 0.45
"""How much of the budget the tests may take; the benchmark has the rest."""
RESERVE = 10.0
"""Seconds kept back for ending stages and writing the report."""
_GRACE = 4.0
_WRITE_EVERY = 5.0
_MAX_LOG = 8 * 2**20

_MACHINE = """
import json, sys, torch
about = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
about["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(about))
"""


@dataclass
class Stage:
    """One command, and what became of it."""

    name: str
    command: Sequence[str]
    limit: float
    """Seconds."""
    env: Mapping[str, str]
    log: Path
    outcome: str = "not begun"
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.outcome, self._start = "running", time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=dict(self.env), cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
            )

    def run(self, meanwhile: Callable[[], None]) -> None:
        """Wait until it has ended or its limit is over."""
        self.start()
        assert self.process is not None
        written = time.monotonic()
        while self.process.poll() is None:
            self.seconds = time.monotonic() - self._start
            if self.seconds > self.limit:
                self.stop()
                self.outcome = f"ended after its limit of {self.limit:.0f} s"
                break
            if time.monotonic() - written > _WRITE_EVERY:
                meanwhile()
                written = time.monotonic()
            time.sleep(0.1)
        else:
            self.outcome = f"exit code {self.process.returncode}"
        self.seconds = time.monotonic() - self._start
        meanwhile()

    def wait(self, until: float) -> None:
        """Wait until it has ended, but at most until this time of `time.monotonic`."""
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=max(0.0, until - time.monotonic()))

    def stop(self) -> None:
        """End it, and all that it has started, also what is in a session of its own."""
        if self.process is None or self.process.poll() is not None:
            return
        family = _descendants(self.process.pid)
        for how, grace in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, 1.0)):
            for pid in [self.process.pid, *family]:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=grace)


def _descendants(pid: int) -> list[int]:
    """Processes that this one has started, and those that they have."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def read_tests(path: Path) -> list[dict[str, Any]]:
    """Each test with its outcome: what `benchmarks.gpu.pytest_progress` has written."""
    tests: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the last line of a run that was killed
                row = json.loads(line)
                if tests.get(row["test"], {}).get("outcome") != "failed":  # a failure at its end counts as well
                    tests[row["test"]] = {**tests.get(row["test"], {}), **row}
    return [{**test, "outcome": "unfinished"} if test["outcome"] == "begun" else test for test in tests.values()]


class Report:
    """What is known so far, as report.md and report.json."""

    def __init__(self, out: Path, stages: Sequence[Stage], folder: Path, about: dict[str, Any]) -> None:
        self._out, self._stages, self._folder, self.about = out, stages, folder, about
        self.skipped: list[str] = []
        """What was left out, and why."""

    def write(self) -> None:
        tests = read_tests(self._folder / "tests.jsonl")
        benchmark = self._folder / "benchmark.json"
        measured: dict[str, Any] = {}
        if benchmark.exists():
            with suppress(json.JSONDecodeError):
                measured = json.loads(benchmark.read_text())
        stages = {s.name: {"outcome": s.outcome, "seconds": s.seconds, "limit": s.limit} for s in self._stages}
        everything = {"machine": self.about, "stages": stages, "skipped": self.skipped, "tests": tests}
        self._put("report.json", json.dumps({**everything, "benchmark": measured}, indent=1))
        self._put("report.md", self.markdown(tests))

    def _put(self, name: str, text: str) -> None:
        beside = self._out / f".{name}"
        beside.write_text(text)
        os.replace(beside, self._out / name)

    def summary(self, tests: Sequence[Mapping[str, Any]]) -> str:
        counts = Counter(test["outcome"] for test in tests)
        lines = [f"{s.name}: {s.outcome}, {s.seconds:.0f} of {s.limit:.0f} s" for s in self._stages]
        told = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped", "unfinished"))
        lines.append(f"tests: {told}")
        lines += [f"skipped: {what}" for what in self.skipped]
        reasons = Counter(test["why"] for test in tests if test["outcome"] == "skipped")
        lines += [f"skipped: {count} tests: {why}" for why, count in reasons.items()]
        return "\n".join(f"- {line}" for line in lines)

    def markdown(self, tests: Sequence[Mapping[str, Any]]) -> str:
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        parts = ["# GPU check", about, self.summary(tests)]
        if bad := [test for test in tests if test["outcome"] in ("failed", "unfinished")]:
            parts.append("## Tests that failed or did not finish")
            parts += [f"### {test['test']} ({test['outcome']})\n\n```\n{test.get('why', '')}\n```" for test in bad]
        told = [(test["test"], key, value) for test in tests for key, value in test.get("told", {}).items()]
        if told:
            parts += ["## What the tests measured", "| test | what | value |\n| --- | --- | --- |"]
            parts[-1] += "".join(f"\n| {test.split('::')[-1]} | {key} | {value} |" for test, key, value in told)
        if tests:
            parts += ["## All tests", "| test | outcome | seconds |\n| --- | --- | --- |"]
            parts[-1] += "".join(f"\n| {t['test']} | {t['outcome']} | {t.get('seconds', 0):.1f} |" for t in tests)
        table = self._folder / "benchmark.md"
        parts += ["## Benchmark", table.read_text() if table.exists() else "Nothing was measured."]
        return "\n\n".join(parts) + "\n"


def _test_command(device: str, tests: Path) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu" if device == "cuda" else "not gpu and not slow",
        str(tests),
    ]
    # Another torch than the one we develop with may warn of other things, which is no failure here.
    command += ["-W", "default", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_progress", "-ra"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "150"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(6, max(2, (os.cpu_count() or 2) // 2))), "--dist", "load"]
    return command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report and the logs")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, with tiny sizes")
    parser.add_argument("--tests", type=Path, default=REPOSITORY / "tests" / "gpu", help="which tests to run")
    parser.add_argument("--only", choices=("tests", "benchmark"), help="leave out the other stage")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.budget - RESERVE
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        env |= {"TEST_PROGRESS": str(folder / "tests.jsonl"), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        if args.device == "cuda":
            env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that looking for a GPU doesn't spoil a process for forking
        about = _machine(env)
        limit = (end - time.monotonic()) * (SHARE_OF_TESTS if args.only is None else 1)
        benchmark = [sys.executable, "-m", "benchmarks", "--gpu", "--device", args.device, "--out", str(folder)]
        tests = Stage("tests", _test_command(args.device, args.tests), limit, env, out / "tests.log")
        measuring = Stage("benchmark", benchmark, 0.0, env, out / "benchmark.log")
        # Compiling takes a minute; done beside the tests, whose times don't matter, it costs none.
        warm = Stage("compile", [sys.executable, "-m", "benchmarks.gpu.warm"], limit, env, out / "compile.log")
        stages = [stage for stage in (tests, measuring) if args.only in (None, stage.name)]
        report = Report(out, stages, folder, about)
        compiles = args.device == "cuda" and bool(about.get("gpus")) and args.only is None
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            if args.device == "cuda" and not about.get("gpus"):
                report.skipped.append("everything: torch sees no GPU. `--device cpu` makes a dry run of this script.")
                stages.clear()
            for stage in stages:
                if stage is tests and compiles:
                    warm.start()
                if stage is measuring:
                    warm.wait(until=end - (1 - SHARE_OF_TESTS) * args.budget)  # what it has not compiled takes longer
                    warm.stop()
                    stage.limit = max(0.0, end - time.monotonic())
                    stage.command = [*benchmark, "--seconds", f"{max(1.0, stage.limit - 8):.0f}"]
                _say(f"{stage.name}: at most {stage.limit:.0f} s")
                stage.run(report.write)
                _say(f"{stage.name}: {stage.outcome}, {stage.seconds:.0f} s")
        finally:
            for stage in (tests, measuring, warm):
                stage.stop()
            report.write()
            for log in out.glob("*.log"):
                _shorten(log)
            found = read_tests(folder / "tests.jsonl")
            text = (out / "report.md").read_text()
            print(report.summary(found))
            for test in found:
                if test["outcome"] in ("failed", "unfinished"):
                    print(f"\n{test['outcome']}: {test['test']}\n{_last(test.get('why', ''), 12)}")
            print(_section(text, "## What the tests measured") + _section(text, "## Benchmark"))
            print(f"The report is {out / 'report.md'}.")
    is_good = all(test["outcome"] in ("passed", "skipped") for test in found)
    return 0 if stages and is_good and all(stage.outcome == "exit code 0" for stage in stages) else 1


def _machine(env: Mapping[str, str]) -> dict[str, Any]:
    """What torch sees, asked in a process of its own: this one must neither wait for it nor hold the GPU."""
    try:
        command = [sys.executable, "-c", _MACHINE]
        done = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=90, check=True)
        about: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as ex:
        return {"torch": f"could not be asked: {ex}"[:300]}
    return about


def _section(text: str, heading: str) -> str:
    """A section of level 2 with its heading, if it is there."""
    _, found, rest = text.partition(f"\n{heading}\n")
    return f"\n{heading}\n{rest.split(chr(10) + '## ')[0]}" if found else ""


def _last(text: str, num_lines: int) -> str:
    return "\n".join(f"    {line[:200]}" for line in text.strip().splitlines()[-num_lines:])


def _shorten(log: Path) -> None:
    if log.stat().st_size > _MAX_LOG:
        log.write_bytes(log.read_bytes()[-_MAX_LOG:])


def _say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
