"""What every test file shares: skips with a reason, the sample of large grids, seeds, devices."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DEVICES
from sampling import GRID, SEED, chosen, takes_long

from mtlfast import _native
from mtlfast.jacobian import _plan

with warnings.catch_warnings():
    # Without the extension the first op warns once; MTLFAST_REQUIRE_NATIVE=1 makes this line fail instead.
    warnings.simplefilter("ignore")
    NATIVE = _native.module() is not None
    CUDA_KERNELS = _native.why_not(torch.device("cuda")) == ""


def reason_to_skip(marks: set[str]) -> str | None:
    if "cuda" in marks and not torch.cuda.is_available():
        return "needs a GPU"
    if "native" in marks and not NATIVE:
        return "needs the compiled extension"
    if {"cuda", "native"} <= marks and not CUDA_KERNELS:
        return "needs the compiled CUDA kernels"
    return None


# How many cases this run takes and how many the grids have, which pytest prints at its end.
TAKEN = pytest.StashKey[tuple[int, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        reason = reason_to_skip({mark.name for mark in item.iter_markers()})
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    named = config.getoption("keyword") or any("::" in argument for argument in config.args)
    kept = items[:] if named else list(sampled(items))
    config.stash[TAKEN] = (len(kept), len(items))
    left = set(items) - set(kept)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = kept


def sampled(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """The cases that this run takes, in order. The skipped cases of a test function are sampled by themselves."""
    grids: dict[tuple[str, bool], list[pytest.Item]] = {}
    for item in items:
        function = item.nodeid.split("[")[0]
        grids.setdefault((function, item.get_closest_marker("skip") is not None), []).append(item)
    kept: set[pytest.Item] = set()
    for (function, _), cases in grids.items():
        if cases[0].get_closest_marker("long") and not takes_long(function):
            continue
        if cases[0].get_closest_marker("whole"):
            kept.update(cases)
            continue
        marker = cases[0].get_closest_marker("grid")
        parameters = [getattr(case, "callspec", None) for case in cases]
        values = [{} if known is None else known.params for known in parameters]
        kept.update(cases[i] for i in chosen(values, function, () if marker is None else marker.args))
    return (item for item in items if item in kept)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Under pytest-xdist the cases are collected by its workers, which tell the process that reports.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["taken"] = list(session.config.stash.get(TAKEN, (0, 0)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if "taken" in getattr(node, "workeroutput", {}):
        node.config.stash[TAKEN] = tuple(node.workeroutput["taken"])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    taken, known = config.stash.get(TAKEN, (0, 0))
    terminalreporter.write_line(f"grids: MTLFAST_GRID={GRID} MTLFAST_SEED={SEED}, {taken} of {known} cases")
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call" and report.user_properties:
            recorded = ", ".join(f"{name}: {value}" for name, value in report.user_properties)
            terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {recorded}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `jacobian="auto"` look at the graphs of small models, too."""
    monkeypatch.setattr(_plan, "SMALL", 0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on every device."""
    return request.param


@pytest.fixture
def schedules(device: str) -> Iterator[Iterator[None]]:
    """Iterates over ways to run that must give the same bits: thread counts on the CPU, streams on a GPU."""
    before = torch.get_num_threads()
    yield _thread_counts() if device == "cpu" else _streams()
    torch.set_num_threads(before)


def _thread_counts() -> Iterator[None]:
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        yield


def _streams() -> Iterator[None]:
    current = torch.cuda.current_stream()
    for stream in (current, torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)
