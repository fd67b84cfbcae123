"""A pytest plugin: `-p outcomes --outcomes FILE` keeps counts and failures in FILE, JSON written after every test."""

import json
from pathlib import Path
from typing import Any

import pytest
from records import write_whole

MOST_FAILURES = 40  # whose reasons are kept


class Outcomes:
    """What has become of the tests so far."""

    def __init__(self, path: Path) -> None:
        """Keeps it in `path`."""
        self.path = path
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test has ended."""
        if report.failed:
            self.add_failure(report)
        elif report.skipped or report.when == "call":
            self.counts["skipped" if report.skipped else "passed"] += 1
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file has been read."""
        if report.failed:
            self.add_failure(report)
            self.write()

    def add_failure(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Counts it and keeps why."""
        self.counts["failed"] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else report.longreprtext
        self.failures.append({"test": report.nodeid, "why": why[:300]})

    def write(self) -> None:
        """The file, whole or not at all."""
        write_whole(self.path, json.dumps({**self.counts, "failures": self.failures[:MOST_FAILURES]}))


def pytest_addoption(parser: pytest.Parser) -> None:
    """--outcomes FILE."""
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    """One file, also where several processes run the tests: only they have a `workerinput`."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")))
