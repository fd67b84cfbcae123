"""The host part of the CUDA launchers, a C++ program of its own: sizes beyond 2^31 and 2^40."""

import subprocess

import pytest
from emulate import AVAILABLE, CHECKOUT, CXX, HERE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs the checkout and a C++ compiler")


def test_tables_chunks_and_widths(tmp_path):
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "pack_test"
    subprocess.run([CXX, *flags, f"-I{CHECKOUT / 'csrc'}", HERE / "pack_test.cpp", "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stdout + run.stderr
