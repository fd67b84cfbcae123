"""The emulator, built once, and the rungs that the CUDA kernels have climbed in this run."""

import pytest
from emulate import AVAILABLE, Emulator

from mtlfast import _native

BUILT: list[Emulator] = []


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not AVAILABLE:
        pytest.skip("needs the checkout and a C++ compiler")
    BUILT.append(Emulator())
    return BUILT[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    def on_gpu(outcome: str) -> int:
        reports = terminalreporter.getreports(outcome)
        return sum("cuda" in report.keywords and (report.when == "call" or outcome == "skipped") for report in reports)

    compiled = ", ".join(
        f"{len(kernels)} for {arch}" for arch, kernels in _native.build_facts().get("cuda_kernels", {}).items()
    )
    emulated = BUILT[0].cases if BUILT else set()
    terminalreporter.write_line(
        f"CUDA kernels (one for each dtype and number of rows): compiled {compiled or 'none'}; emulated "
        f"{len({kernel for kernel, _ in emulated})} in {len(emulated)} kernel x dtype x K cases; on a GPU "
        f"{on_gpu('passed')} tests passed, {on_gpu('skipped')} skipped"
    )
