"""What an op allocates beside its operands: the process's peak, as the kernel counts it (Linux)."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from mtlfast import ops
from mtlfast.bench.section import Section
from mtlfast.bench.workload import scattered

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_bytes(run: Callable[[], object]) -> int:
    """The most memory that `run` holds beyond what the process has, in bytes; threads must have been started before."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what is allocated again
    CLEAR.write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(elements: int) -> Section:
    """The peak of `gram` and `combine`.

    Args:
        elements: P.
    """
    section = Section(
        "memory",
        f"Peak memory beside the operands, {elements / 1e6:g}M float32 elements",
        f"One update direction takes {elements * 4 / 2**20:.1f} MiB.",
    )
    if not CLEAR.exists():
        return section
    ops.gram(scattered(2, 100_000))  # starts the threads
    for K in (8, 32):
        section.rows += [{"op": op, "K": K, "MiB": extra_bytes(run) / 2**20} for op, run in _cases(K, elements).items()]
    return section


def _cases(num_tasks: int, elements: int) -> dict[str, Callable[[], object]]:
    grads, weights = scattered(num_tasks, elements), torch.ones(num_tasks)
    own = list(grads.rows[0])
    return {
        "gram": lambda: ops.gram(grads),
        "combine in place over task 0": lambda: ops.combine(grads, weights, out=own),
        "combine": lambda: ops.combine(grads, weights),
    }
