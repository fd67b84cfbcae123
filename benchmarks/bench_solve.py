"""The K x K solvers, Python included."""

import pytest
import torch

from mtlfast import ops, reference


@pytest.mark.parametrize("num_tasks", [2, 8, 40, 128])
@pytest.mark.parametrize("method", sorted(reference.SOLVERS))
def bench_solver(benchmark, method, num_tasks):
    benchmark.group = f"{method}, K = {num_tasks}"
    J = torch.randn(num_tasks, 2 * num_tasks, dtype=torch.float64)
    gram, keys = J @ J.T, torch.rand(num_tasks, num_tasks, dtype=torch.float64)
    benchmark(ops.solve, gram, method, [0.0], [keys])
