"""The synthetic regression of the MMoE paper (Ma et al., KDD 2018, section 3.2): two tasks as alike as one wants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import Batch, Task, Workload

# The paper leaves open how many sines there are, and their frequencies and phases.
INPUTS, BATCH, TEST = 32, 128, 4096
SINES, NOISE = 4, 0.1  # the noise's standard deviation
PARAMETERS = 16_000


class Regression(NamedTuple):
    """What makes labels of inputs: y_k = w_k x + sum over i of sin(a_i w_k x + b_i) + noise.

    Attributes:
        weights: [2, INPUTS], whose cosine is the tasks' correlation.
        frequencies: [SINES], the a_i.
        phases: [SINES], the b_i.
    """

    weights: Tensor
    frequencies: Tensor
    phases: Tensor

    def draw(self, samples: int, generator: torch.Generator) -> Batch[Tensor]:
        """So many inputs x ~ N(0, 1) and their labels, [samples, 2]."""
        x = torch.randn(samples, INPUTS, generator=generator)
        z = x @ self.weights.T
        sines = (z.unsqueeze(2) * self.frequencies + self.phases).sin().sum(2)
        return Batch(x, z + sines + NOISE * torch.randn(z.shape, generator=generator))


def regression(correlation: float, generator: torch.Generator) -> Regression:
    """Draws two orthogonal unit vectors u and v, and takes w_1 = u, w_2 = p u + sqrt(1 - p^2) v.

    Args:
        correlation: p, from -1 to 1.
        generator: draws u, v, frequencies from 1 to 2 and phases.
    """
    u, v = torch.linalg.qr(torch.randn(INPUTS, 2, generator=generator)).Q.T
    second = correlation * u + math.sqrt(1 - correlation**2) * v
    frequencies = 1 + torch.rand(SINES, generator=generator)
    return Regression(torch.stack([u, second]), frequencies, 2 * math.pi * torch.rand(SINES, generator=generator))


def synthetic(correlation: float, seed: int) -> Workload:
    """Two regressions on the same inputs, each batch of which is new.

    Args:
        correlation: of the tasks, from -1 to 1.
        seed: of the tasks and of the test samples.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = regression(correlation, generator)
    test = labels.draw(TEST, generator)

    def batches(seed: int) -> Iterator[Batch[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield labels.draw(BATCH, generator)

    variances = test.targets.var(0).tolist()
    return Workload(
        tuple(_task(k, variance) for k, variance in enumerate(variances)), PARAMETERS, INPUTS, batches, test
    )


def _task(k: int, variance: float) -> Task:
    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(output.squeeze(1), labels[:, k]) / variance

    def metric(output: Tensor, labels: Tensor) -> Tensor:
        return 100 * loss(output, labels).sqrt()

    return Task(f"label {k}", 1, loss, metric, "RMS error, % of the label's standard deviation")
