"""The Gram aggregators' weights, Python included; `python -m mtlfast bench` shows them beside TorchJD's."""

import pytest
import torch

from mtlfast.bench.solves import METHODS


@pytest.mark.parametrize("num_tasks", [3, 8, 40, 128])
@pytest.mark.parametrize("method", METHODS)
def bench_weights(benchmark, method, num_tasks):
    benchmark.group = f"weights, K = {num_tasks}"
    J = torch.randn(num_tasks, 2 * num_tasks, dtype=torch.float64)
    benchmark(METHODS[method][0]().weights, J @ J.T)
