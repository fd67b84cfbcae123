"""The emulator finds the faults that it is there for: each is compiled into a small kernel and into the real ones."""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch
from cases import draw, matrix
from emulate import Guarded, view_of
from host_build import AVAILABLE, CXX, HERE, build

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs the checkout and a C++ compiler")
N = 1024 + 301  # two blocks, an odd tail


def compiled(source: str, *faults: str, **options: str) -> str:
    """The library of faulty.cu or faulty_gram.cu with faults compiled in."""
    name = "-".join([source, *faults]).lower()
    return build(name, [HERE / f"{source}.cu"], [f"-DFAULT_{fault}" for fault in faults], **options)


def expected(x: torch.Tensor) -> torch.Tensor:
    """What sums_kernel of faulty.cu computes."""
    padded = torch.cat([x, torch.zeros(-len(x) % 1024)]).view(-1, 8, 32, 4)
    mirrored = padded.reshape(-1, 1024).flip(1).view_as(padded)
    warps = padded[..., 0].sum(-1)[..., None, None]
    return (padded + mirrored + warps).reshape(-1)[: len(x)]


def sums(*faults: str, seed: int = 0) -> str:
    """Runs sums_kernel: '' if it computes what it should, else what was noticed."""
    library = ctypes.CDLL(compiled("faulty", *faults))
    library.run_sums.restype = ctypes.c_char_p
    memory = Guarded()
    x, out = torch.randn(N), memory.new((N,), torch.float32)
    error = library.run_sums(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), N, ctypes.c_uint64(seed))
    if error:
        return error.decode()
    try:
        memory.check()
    except AssertionError as noticed:
        return str(noticed)
    return "" if torch.allclose(out, expected(x), atol=1e-4) else "wrong result"


@pytest.mark.parametrize("seed", range(4))
def test_without_a_fault_nothing_is_noticed(seed):
    assert sums(seed=seed) == ""


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        ("STORE", "written behind an output"),
        ("NO_BARRIER", "wrong result"),
        ("NO_WAIT", "wrong result"),
        ("SHUFFLE_MASK", "shuffles (with a mask that leaves it out|from a lane that its mask leaves out)"),
        ("LOST_BARRIER", "deadlock: 255 threads wait at a barrier, 0 at a shuffle, 1 have returned"),
    ],
)
def test_a_fault_is_noticed(fault, noticed, seed):
    assert re.search(noticed, sums(fault, seed=seed))


def gram(num_tasks: int, *faults: str) -> str:
    """Runs the real Gram kernel for so many tasks, likewise."""
    library = ctypes.CDLL(compiled("faulty_gram", *faults))
    library.run_gram.restype = ctypes.c_char_p
    grads = draw(num_tasks, [(5000,), (130,)])
    J, out = matrix(grads), torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)
    error = library.run_gram(ctypes.byref(view_of(grads)), ctypes.c_void_p(out.data_ptr()), ctypes.c_uint64(1))
    return error.decode() if error else "" if torch.allclose(out, J @ J.T, atol=1e-2) else "wrong result"


@pytest.mark.parametrize(
    ("num_tasks", "fault", "noticed"),
    [
        (3, "NO_BARRIER", "wrong result"),
        (17, "NO_BARRIER", "wrong result"),
        (3, "SHUFFLE_MASK", "gram_kernel<float, 3, float>, block .* shuffles"),
        (17, "NO_WAIT", "wrong result"),
    ],
)
def test_a_fault_in_the_gram_kernels_is_noticed(num_tasks, fault, noticed):
    assert re.search(noticed, gram(num_tasks, fault))


def test_the_gram_kernels_without_a_fault():
    assert [gram(num_tasks) for num_tasks in (3, 17)] == ["", ""]


def stderr_of(code: str, **environment: str) -> str:
    """What a Python of its own says that the code must kill: sanitizers end the process."""
    setup = f"import sys, ctypes; sys.path[:0] = {[str(HERE), str(HERE.parent), *sys.path]}; import test_faults\n"
    process = subprocess.run(
        [sys.executable, "-c", setup + code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert process.returncode != 0
    return process.stderr


def test_a_misaligned_load_ends_the_process_at_its_line():
    report = stderr_of("test_faults.sums('MISALIGNED_LOAD')")
    assert re.search(r"faulty\.cu:\d+:.*misaligned address", report)


def test_an_off_by_one_store_ends_the_process_under_address_sanitizer():
    libraries = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    library = compiled("faulty", "STORE", sanitize="address,undefined")
    code = (
        f"library = ctypes.CDLL({library!r})\n"
        "malloc = ctypes.CDLL(None).malloc; malloc.restype = ctypes.c_void_p\n"
        f"x, out = (ctypes.c_void_p(malloc({4 * N})) for _ in range(2))\n"
        f"library.run_sums(x, out, {N}, ctypes.c_uint64(1))"
    )
    report = stderr_of(code, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")
    assert "heap-buffer-overflow" in report
    assert re.search(r"sums_kernel.*faulty\.cu:\d+", report)
