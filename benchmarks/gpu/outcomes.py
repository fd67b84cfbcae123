"""A pytest plugin: `-p outcomes --outcomes FILE` keeps counts and failures in FILE, JSON written after every test."""

import json
from pathlib import Path
from typing import Any

import pytest

MOST_FAILURES = 40  # whose reasons are kept


class Outcomes:
    """The outcomes of the tests so far."""

    def __init__(self, path: Path) -> None:
        """`path` is the file that is written."""
        self.path = path
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts one phase of one test."""
        if report.failed:
            self.add_failure(report)
        elif report.skipped or report.when == "call":
            self.counts["skipped" if report.skipped else "passed"] += 1
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Counts a test file that could not be read."""
        if report.failed:
            self.add_failure(report)
            self.write()

    def add_failure(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Counts a failure and keeps its reason."""
        self.counts["failed"] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else report.longreprtext
        self.failures.append({"test": report.nodeid, "why": why[:300]})

    def write(self) -> None:
        """Writes the file completely or not at all."""
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({**self.counts, "failures": self.failures[:MOST_FAILURES]}))
        draft.replace(self.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option `--outcomes FILE`."""
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin in one process only. Workers of pytest-xdist have a `workerinput`."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")))
