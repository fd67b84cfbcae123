"""What every test file shares: skips that say why, seeds, devices."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from cases import DEVICES

from mtlfast import _native

with warnings.catch_warnings():
    # Without the extension the first op warns once; MTLFAST_REQUIRE_NATIVE=1 makes this line fail instead.
    warnings.simplefilter("ignore")
    NATIVE = _native.module() is not None
    CUDA_KERNELS = _native.serves(torch.device("cuda"))


def reason_to_skip(marks: set[str]) -> str | None:
    if "cuda" in marks and not torch.cuda.is_available():
        return "needs a GPU"
    if "native" in marks and not NATIVE:
        return "needs the compiled extension"
    if {"cuda", "native"} <= marks and not CUDA_KERNELS:
        return "needs the compiled CUDA kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = reason_to_skip({mark.name for mark in item.iter_markers()})
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on every device."""
    return request.param


@pytest.fixture
def schedules(device: str) -> Iterator[Iterator[None]]:
    """Ways to run that must not change a bit, one after the other: thread counts on the CPU, streams on a GPU."""
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
