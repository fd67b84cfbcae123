"""What ptxas reports for the CUDA kernels: no stack, no spills, no more registers than registers.json says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mtlfast import _native

TABLE = Path(__file__).parents[1] / "csrc" / "cuda" / "registers.json"
KERNELS = _native.build_facts().get("cuda_kernels", {})

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="needs the checkout")
def test_nvcc_is_the_one_on_the_path_else_in_cuda_home_else_from_pypi(tmp_path):
    folders = {
        "on the PATH": tmp_path / "path",
        "in CUDA_HOME": tmp_path / "home" / "bin",
        "from PyPI": tmp_path / "site" / "nvidia" / "cu13" / "bin",
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text("#!/bin/sh\n")
        (folder / "nvcc").chmod(0o755)
    env = {**os.environ, "PATH": str(tmp_path / "path"), "CUDA_HOME": str(tmp_path / "home")}
    ask = "import toolkit; print(*next(toolkit.find_nvccs()), sep='; ')"
    for found, folder in folders.items():
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ask],
            cwd=CHECKOUT / "csrc",
            env={**env, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
        )
        assert run.stdout.splitlines()[-1] == f"{folder / 'nvcc'}; {found}", run.stderr
        (folder / "nvcc").unlink()


@pytest.mark.parametrize("arch", KERNELS)
def test_nothing_spills(arch):
    assert {name: k for name, k in KERNELS[arch].items() if k["stack"] > 0 or k["spilled"] > 0} == {}


@pytest.mark.parametrize("arch", KERNELS)
def test_static_shared_memory_fits_every_gpu(arch):
    assert max(kernel["shared"] for kernel in KERNELS[arch].values()) <= 48 * 1024


class Processor(NamedTuple):
    """What the blocks of one multiprocessor share."""

    shared: int  # bytes
    threads: int
    blocks: int
    registers: int = 65536

    def resident(self, kernel: dict[str, int], threads: int) -> int:
        """How many blocks of a kernel run at once: registers go to warps in units of 256, 1 KiB to each block."""
        warps, a_warp = threads // 32, -(-kernel["registers"] * 32 // 256) * 256
        by_shared = self.shared // (kernel["shared"] + 1024)
        return min(self.threads // threads, self.blocks, self.registers // a_warp // warps, by_shared)


PROCESSORS = {
    "sm_80": Processor(164 << 10, 2048, 32),
    "sm_90": Processor(228 << 10, 2048, 32),
    "sm_100": Processor(228 << 10, 2048, 32),
    "sm_120": Processor(100 << 10, 1536, 24),
}


def facts_of(arch: str) -> dict[str, dict[str, int]]:
    """Of each kernel: registers, bytes of static shared memory and, where the processor is known, blocks on one."""
    facts = {}
    for name, kernel in sorted(KERNELS[arch].items()):
        facts[name] = {"registers": kernel["registers"], "shared": kernel["shared"]}
        if arch in PROCESSORS:
            threads = 128 if name.startswith("solve_kernel") else 256
            facts[name]["blocks"] = PROCESSORS[arch].resident(kernel, threads)
    return facts


def test_resident_blocks_by_hand():
    # 80 registers: 2560 a warp, 20480 a block of 8 warps: 3 of 65536. 35844 bytes and 1 KiB of 233472: 6.
    assert PROCESSORS["sm_90"].resident({"registers": 80, "shared": 4356}, 256) == 3
    assert PROCESSORS["sm_90"].resident({"registers": 32, "shared": 35844}, 256) == 6
    assert PROCESSORS["sm_90"].resident({"registers": 32, "shared": 0}, 256) == 8
    assert PROCESSORS["sm_120"].resident({"registers": 255, "shared": 0}, 256) == 1


@pytest.mark.skipif(not TABLE.parent.exists(), reason="needs the checkout")
@pytest.mark.parametrize("arch", KERNELS)
def test_registers(arch):
    facts = facts_of(arch)
    nvcc = ".".join(_native.build_facts()["nvcc"].split(".")[:2])
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if os.environ.get("MTLFAST_WRITE_REGISTERS") == "1":
        table.setdefault(nvcc, {})[arch] = facts
        lines = json.dumps(table, indent=1, sort_keys=True)
        TABLE.write_text(
            re.sub(r"\{\s+(\"blocks\"[^}]*?)\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", lines) + "\n"
        )
    if arch not in table.get(nvcc, {}):
        pytest.skip(f"no table for nvcc {nvcc} and {arch}: make registers writes one")
    wanted = table[nvcc][arch]
    assert set(facts) == set(wanted)
    worse = {
        name: (is_now, wanted[name])
        for name, is_now in facts.items()
        if is_now["registers"] > wanted[name]["registers"] or is_now["blocks"] < wanted[name]["blocks"]
    }
    assert worse == {}
