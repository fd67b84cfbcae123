"""What the tests of emulated kernels share: their grids, and which kernels each file must have run."""

import itertools
import os
import random

import torch
from cases import SHAPES
from emulate import Emulator

from mtlfast import _native

# The kernels that each file runs. Its last test sees that all of them ran.
FAMILIES = {
    "test_kernels": (
        "gram_kernel",
        "gram_staged_kernel",
        "gram_plain_kernel",
        "norms_kernel",
        "combine_kernel",
        "flatten_kernel",
        "scale_kernel",
    ),
    "test_elementwise_kernels": (
        "grad_drop_kernel",
        "grad_drop_rounding_kernel",
        "trimmed_mean_kernel",
        "advance_kernel",
        "excess_risks_kernel",
    ),
    "test_solve_kernels": ("solve_kernel",),
}

ALL = os.environ.get("MTLFAST_EMULATE") == "all"
TASKS = [1, 2, 3, 4, 7, 8, 9, 12, 16, 17, 24, 32, 33, 64, 100]

# Around the borders of groups, stages (64 to 256 columns), steps (512 to 2048) and chunks (4096).
EMULATED_SHAPES = {
    **{name: SHAPES[name] for name in ("one", "mixed", "borders", "600 tensors")},
    "chunks": [(4095,), (1,), (4096,), (2049,), (4097,)],
    "one of several chunks": [(13_001,)],
}


def grid(*axes: list, per: int = 1, take: int = 1) -> list:
    """The product of all axes; in a sample, `take` seeded ones of each combination of the first `per` axes."""
    cases = []
    for first in itertools.product(*axes[:per]):
        rest = list(itertools.product(*axes[per:]))
        chosen = rest if ALL else random.Random(str(first)).sample(rest, min(take, len(rest)))
        cases += [(*first, *others) for others in chosen]
    return cases


def shapes_for(name: str, num_tasks: int) -> list:
    """Many tensors take long with many tasks, so it is then a few more than one table of so many rows holds."""
    return EMULATED_SHAPES[name][: 4080 // (min(num_tasks, 64) + 2) + 5]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[1]


def assert_every_kernel_ran(emulator: Emulator, file: str) -> None:
    """Raises unless all kernels of the file that the host compiler and nvcc compile have run."""

    def own(kernels: set[str]) -> set[str]:
        return {kernel for kernel in kernels if kernel.split("<")[0] in FAMILIES[file]}

    compiled = own(emulator.compiled())
    assert compiled == own({kernel for kernel, _ in emulator.cases})
    assert {kernel.split("<")[0] for kernel in compiled} == set(FAMILIES[file])
    for kernels in _native.build_facts().get("cuda_kernels", {}).values():
        assert own({kernel.replace(" ", "") for kernel in kernels}) == compiled
