"""The emulator, built once, and the rungs that the CUDA kernels have climbed in this run."""

from typing import Any

import pytest
from emulate import AVAILABLE, Emulator

from mtlfast import _native

BUILT: list[Emulator] = []
EMULATED = pytest.StashKey[tuple[int, int]]()


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not AVAILABLE:
        pytest.skip("needs the checkout and a C++ compiler")
    BUILT.append(Emulator())
    return BUILT[0]


def emulated(config: pytest.Config) -> tuple[int, int]:
    """How many kernels ran in how many cases, here or in the processes of pytest-xdist."""
    cases = BUILT[0].cases if BUILT else set()
    return config.stash.get(EMULATED, (len({kernel for kernel, _ in cases}), len(cases)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["emulated"] = list(emulated(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    kernels, cases = getattr(node, "workeroutput", {}).get("emulated", (0, 0))
    before = node.config.stash.get(EMULATED, (0, 0))
    node.config.stash[EMULATED] = (max(kernels, before[0]), cases + before[1])


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
        f"{kernels} in {cases} kernel x dtype x K cases; on a GPU "
        f"{on_gpu('passed')} tests passed, {on_gpu('skipped')} skipped"
    )
