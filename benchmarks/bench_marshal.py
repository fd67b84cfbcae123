"""The time to make TaskGradients, for each tensor, before any kernel runs."""

import pytest
import torch

from mtlfast import TaskGradients


@pytest.mark.parametrize("num_tensors", [150, 10_000])
def bench_marshal(benchmark, num_tensors):
    rows = tuple(tuple(torch.zeros(100) for _ in range(num_tensors)) for _ in range(8))
    benchmark(TaskGradients.from_rows, rows)
