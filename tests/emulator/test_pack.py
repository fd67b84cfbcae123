"""The host part of the CUDA launchers, as C++ programs of their own: sizes beyond 2^31 and 2^40; streams' counters."""

import subprocess

import pytest
from host_build import AVAILABLE, CHECKOUT, CXX, HERE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs the checkout and a C++ compiler")


@pytest.mark.parametrize("source", ["pack_test.cpp", "streams_test.cpp"])
def test_host_part(source, tmp_path):
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    includes = [f"-I{CHECKOUT / 'csrc'}", f"-I{HERE / 'include'}"]
    program = tmp_path / "program"
    subprocess.run([CXX, *flags, *includes, HERE / source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stdout + run.stderr
