"""The memory that ops allocate beside their operands, from the process's peak as Linux counts it (docs/promises.md)."""

import pytest
import torch

from mtlfast import ops
from mtlfast.bench.peak_memory import CLEAR, extra_bytes
from mtlfast.bench.workload import scattered

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's /proc"),
]
P, MIB = 4_000_000, 2**20


@pytest.mark.parametrize("num_tasks", [8, 32])
def test_peak_beside_the_operands(num_tasks):
    grads, weights = scattered(num_tasks, P), torch.ones(num_tasks)
    own = list(grads.rows[0])
    ops.gram(grads)  # starts the threads
    direction = P * 4
    assert extra_bytes(lambda: ops.gram(grads)) < MIB
    assert extra_bytes(lambda: ops.norms(grads)) < MIB
    assert extra_bytes(lambda: ops.combine(grads, weights, out=own)) < MIB / 2
    # The smallest outputs may find room in what earlier tests left behind.
    assert direction - MIB < extra_bytes(lambda: ops.combine(grads, weights)) < direction + MIB
