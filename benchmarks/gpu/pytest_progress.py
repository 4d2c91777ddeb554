"""A pytest plugin that writes each test's fate as soon as it is known: a run that is killed has told what it did.

`TEST_PROGRESS` names the file: one JSON object a line, when a test begins and when it has ended.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest


class Progress:
    """Writes the file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def _write(self, **row: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        told = dict(report.user_properties) if report.when == "call" else {}
        self._write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, why=why[-6000:], told=told)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", seconds=0.0, why=report.longreprtext[-6000:], told={})


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("TEST_PROGRESS")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that started them
        config.pluginmanager.register(Progress(path), "progress")
