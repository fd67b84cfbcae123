"""The workloads that benchmarks share."""

import functools

import torch

from mtlfast.bench.workload import scattered

ELEMENTS = 5_000_000
TASKS = [2, 8]
WAYS = ["mtlfast", "plain PyTorch"]


@functools.lru_cache(maxsize=2)
def workload(num_tasks: int, dtype: torch.dtype = torch.float32):
    """K tasks x 150 scattered tensors, 5M elements a task."""
    return scattered(num_tasks, ELEMENTS, dtype)
