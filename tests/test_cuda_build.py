"""What ptxas made of the CUDA kernels: nothing on the stack, nothing spilled, no more registers than written down."""

import json
import os
from pathlib import Path

import pytest

from mtlfast import _native

TABLE = Path(__file__).parents[1] / "csrc" / "cuda" / "registers.json"
KERNELS = _native.build_facts().get("cuda_kernels", {})

pytestmark = pytest.mark.skipif(not KERNELS, reason="needs a build with CUDA kernels")


@pytest.mark.parametrize("arch", KERNELS)
def test_nothing_spills(arch):
    assert {name: k for name, k in KERNELS[arch].items() if k["stack"] > 0 or k["spilled"] > 0} == {}


@pytest.mark.parametrize("arch", KERNELS)
def test_static_shared_memory_fits_every_gpu(arch):
    assert max(kernel["shared"] for kernel in KERNELS[arch].values()) <= 48 * 1024


@pytest.mark.skipif(not TABLE.parent.exists(), reason="needs the checkout")
@pytest.mark.parametrize("arch", KERNELS)
def test_registers(arch):
    registers = {name: kernel["registers"] for name, kernel in sorted(KERNELS[arch].items())}
    nvcc = ".".join(_native.build_facts()["nvcc"].split(".")[:2])
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if os.environ.get("MTLFAST_WRITE_REGISTERS") == "1":
        table.setdefault(nvcc, {})[arch] = registers
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if arch not in table.get(nvcc, {}):
        pytest.skip(f"no table for nvcc {nvcc} and {arch}: make registers writes one")
    wanted = table[nvcc][arch]
    assert set(registers) == set(wanted)
    assert {name: (n, wanted[name]) for name, n in registers.items() if n > wanted[name]} == {}
