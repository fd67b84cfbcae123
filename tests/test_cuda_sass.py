"""The machine code in the extension: wide loads, nothing in local memory, every architecture that was asked for."""

import re
from collections import Counter
from pathlib import Path

import pytest
from disassembly import architectures, find_cuobjdump, instructions, opcodes

from mtlfast import _native

FACTS = _native.build_facts()
ARCHS = sorted(FACTS.get("cuda_kernels", {}))
WIDE = {  # kernel -> its 128-bit loads: to registers, or by cp.async to shared memory
    "gram_kernel": "LDG.E.128",
    "norms_kernel": "LDG.E.128",
    "gram_staged_kernel": "LDGSTS.E.BYPASS.128",
    "combine_kernel": "LDG.E.128",
    "scale_kernel": "LDG.E.128",
    "advance_kernel": "LDG.E.128",
    "excess_risks_kernel": "LDG.E.128",
    "grad_drop_kernel": "LDG.E.128",
    "grad_drop_rounding_kernel": "LDG.E.128",
    "trimmed_mean_kernel": "LDG.E",  # of a group that fits the registers: 16 bytes for up to 8 rows, 4 for 64
}

needs_kernels = pytest.mark.skipif(not ARCHS, reason="needs a build with CUDA kernels")
needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump and nvdisasm")


def library() -> Path:
    return Path(_native.C.__file__)


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request) -> dict[str, Counter[str]]:
    found = instructions(library(), request.param)
    assert len(found) == len(FACTS["cuda_kernels"][request.param])
    return found


@needs_kernels
@needs_cuobjdump
def test_machine_code_for_every_architecture_and_ptx_for_those_that_say_so():
    asked = {f"sm_{arch.removesuffix('+PTX').replace('.', '')}": arch.endswith("+PTX") for arch in FACTS["cuda_archs"]}
    assert architectures(library(), "elf") == set(asked) == set(ARCHS)
    assert architectures(library(), "ptx") == {arch for arch, with_ptx in asked.items() if with_ptx}


@needs_kernels
@needs_cuobjdump
def test_nothing_in_local_memory(kernels):
    local = {name: {op for op in ops if re.match(r"LDL|STL", op)} for name, ops in kernels.items()}
    assert {name: ops for name, ops in local.items() if ops} == {}


@needs_kernels
@needs_cuobjdump
@pytest.mark.parametrize("kernel", WIDE)
def test_loads_of_16_bytes(kernels, kernel):
    of_kernel = {name: ops for name, ops in kernels.items() if re.search(rf"\d{kernel}I", name)}
    assert of_kernel
    narrow = [name for name, ops in of_kernel.items() if not any(op.startswith(WIDE[kernel]) for op in ops)]
    assert narrow == []


@needs_kernels
@needs_cuobjdump
def test_16_bit_elements_come_in_words_at_every_address(kernels):
    # Of each row four words where its address is a multiple of 4, three and two elements beside them where it is not.
    of_words = {
        name: (ops["LDG.E"], int(rows[1]))
        for name, ops in kernels.items()
        if (rows := re.search(r"\dgram_kernelI(?:13__nv_bfloat16|6__half)Li(\d+)E", name))
    }
    assert len(of_words) == 2 * (9 + 6)  # dtypes; counts of rows for float and for double sums
    assert {name: found for name, found in of_words.items() if found[0] < 7 * found[1]} == {}


def test_opcodes_of_a_listing():
    listing = """
    code for sm_90
        Function : _Z1fPf
    .headerflags    @"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0020*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;              /* 0x0000000104047890 */
        Function : _Z1gPf
        /*0000*/                   STL.64 [R1+0x8], R2 ;                    /* 0x0000080201007387 */
"""
    assert dict(opcodes(listing)) == {
        "_Z1fPf": Counter(["LDC", "LDG.E.128.CONSTANT", "UIADD3"]),
        "_Z1gPf": Counter(["STL.64"]),
    }
