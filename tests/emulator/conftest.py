"""The emulator, built once, and the rungs that the CUDA kernels have climbed in this run."""

from typing import Any

import pytest
from emulate import Emulator
from host_build import AVAILABLE

from mtlfast import _native

BUILT: list[Emulator] = []
EMULATED = pytest.StashKey[tuple[set[str], int]]()


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not AVAILABLE:
        pytest.skip("needs the checkout and a C++ compiler")
    BUILT.append(Emulator())
    return BUILT[0]


def emulated(config: pytest.Config) -> tuple[set[str], int]:
    """Which kernels ran, and in how many cases, here or in the processes of pytest-xdist."""
    cases = BUILT[0].cases if BUILT else set()
    return config.stash.get(EMULATED, ({kernel for kernel, _ in cases}, len(cases)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        kernels, cases = emulated(session.config)
        session.config.workeroutput["emulated"] = [sorted(kernels), cases]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    kernels, cases = getattr(node, "workeroutput", {}).get("emulated", ([], 0))
    before = node.config.stash.get(EMULATED, (set(), 0))
    node.config.stash[EMULATED] = (before[0] | set(kernels), cases + before[1])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    def on_gpu(outcome: str) -> int:
        reports = terminalreporter.getreports(outcome)
        return sum("cuda" in report.keywords and (report.when == "call" or outcome == "skipped") for report in reports)

    compiled = ", ".join(
        f"{len(kernels)} for {arch}" for arch, kernels in _native.build_facts().get("cuda_kernels", {}).items()
    )
    kernels, cases = emulated(terminalreporter.config)
    terminalreporter.write_line(
        f"CUDA kernels (one for each dtype and number of rows): compiled {compiled or 'none'}; emulated "
        f"{len(kernels)} in {cases} kernel x dtype x K cases; on a GPU "
        f"{on_gpu('passed')} tests passed, {on_gpu('skipped')} skipped"
    )
