"""What every test file shares: skips that say why, and seeds."""

import warnings

import pytest
import torch

from mtlfast import _native

with warnings.catch_warnings():
    # Without the extension the first op warns once; MTLFAST_REQUIRE_NATIVE=1 makes this line fail instead.
    warnings.simplefilter("ignore")
    NATIVE = _native.module() is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "cuda": None if torch.cuda.is_available() else "needs a GPU",
        "native": None if NATIVE else "needs the compiled extension",
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's thread count; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
