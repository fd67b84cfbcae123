"""`torch.compile` as a rival: all pairwise dot products of K flat tensors, fused by the compiler."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.bench.section import Section
from mtlfast.bench.timing import take_turns
from mtlfast.task_gradients import TaskGradients


def pairwise(gs: list[Tensor]) -> list[Tensor]:
    """The lower triangle of the Gram matrix, one dot product after another."""
    return [(gs[i] * gs[j]).sum() for i in range(len(gs)) for j in range(i + 1)]


def measure(elements: int, rounds: int, tasks: tuple[int, ...] = (2, 4, 8, 16), device: str = "cpu") -> Section:
    """Times `gram` and the compiled pairwise dot products on K flat tensors.

    Args:
        elements: P.
        rounds: alternating rounds.
        tasks: the numbers of tasks.
        device: where.
    """
    section = Section(
        "compiled",
        f"gram beside torch.compile, on K flat tensors of {elements / 1e6:g}M elements",
        "Compiled: [(g_i * g_j).sum() for i >= j] under torch.compile, in float32. First call: that of the compiled "
        "function, compiling included.",
    )
    section.rows = [_row(K, elements, rounds, device) for K in tasks]
    return section


def _row(num_tasks: int, elements: int, rounds: int, device: str) -> dict[str, Any]:
    flat = [torch.randn(elements, device=device) for _ in range(num_tasks)]
    grads = TaskGradients.from_rows([[gradient] for gradient in flat])
    torch._dynamo.reset()
    compiled = torch.compile(pairwise, dynamic=False)
    start = time.perf_counter()
    try:
        compiled(flat)
    except Exception as error:  # no compiler, or more than it takes: that is a result too
        return {"K": num_tasks, "compiled": f"no: {type(error).__name__}"}
    compiling = time.perf_counter() - start
    ways: dict[str, Callable[[], object]] = {"mtlfast": lambda: ops.gram(grads), "compiled": lambda: compiled(flat)}
    times = take_turns(ways, rounds, device=device)
    return {
        "K": num_tasks,
        "gram, ms": times["mtlfast"].median * 1e3,
        "compiled, ms": times["compiled"].median * 1e3,
        "times faster": list(times["compiled"].ratio_to(times["mtlfast"])),
        "first call, s": compiling,
    }
