"""The emulator, built once, and what it ran."""

import pytest
from emulate import AVAILABLE, Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if not AVAILABLE:
        pytest.skip("needs the checkout and a C++ compiler")
    return Emulator()
